"""How long the reused and the computed model calls of a run take."""

from __future__ import annotations


class CallClock:
    """A call lasts until the next one begins: a GPU still works when a call returns, and is waited for behind it.

    Times are in seconds, of one monotonic clock.
    """

    def __init__(self) -> None:
        self._seconds = {False: 0.0, True: 0.0}
        self._latest: tuple[bool, float, float] | None = None  # reused, began, returned

    def begin(self, now: float) -> None:
        if self._latest is not None:
            reused, began, _ = self._latest
            self._seconds[reused] += now - began
            self._latest = None

    def end(self, began: float, now: float, *, reused: bool) -> None:
        self._latest = reused, began, now

    def seconds(self, *, reused: bool) -> float:
        """Of the calls of either kind; of the latest one until it returned, since nothing is known of later."""
        last, began, returned = self._latest or (reused, 0.0, 0.0)
        return self._seconds[reused] + (returned - began if last == reused else 0.0)
