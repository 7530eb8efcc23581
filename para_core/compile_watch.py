"""Watches torch compile: when a compilation starts and ends, how long it takes, and what made it necessary."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch._dynamo.callback import callback_handler
from torch._dynamo.utils import get_compilation_metrics

TICK = 1.0  # seconds between two reports of a compilation that goes on


class CompileWatch:
    """Counts the compilations that calls of this thread cause, while it is `installed`.

    tell: called when one starts, every TICK seconds while it goes on (by another thread), and when it has ended.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self.since: float | None = None
        self.name: str | None = None
        self._tell, self._thread, self._watching = tell, 0, False
        self._seconds: list[float] = []
        self._over = threading.Event()
        self._ticker: threading.Thread | None = None

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Listen to torch, which has one list of listeners in the process, and stop listening at the end."""
        callback_handler.register_start_callback(self._started)
        callback_handler.register_end_callback(self._ended)
        try:
            yield
        finally:
            # Not with remove_*: another pack's torch._dynamo.reset() has emptied the lists.
            for callbacks, ours in (
                (callback_handler.start_callbacks, self._started),
                (callback_handler.end_callbacks, self._ended),
            ):
                if ours in callbacks:
                    callbacks.remove(ours)

    @contextmanager
    def call(self, name: str) -> Iterator[None]:
        """One call of compiled code of the kind `name`; `taken` tells what it has compiled."""
        self.name, self._thread, self._watching, self._seconds = name, threading.get_ident(), True, []
        try:
            yield
        finally:
            self._watching = False
            self._ended(None)

    @property
    def num_compiled(self) -> int:
        """Compilations of the last call, one that failed included."""
        return len(self._seconds)

    def taken(self) -> list[tuple[float, str]]:
        """(seconds, torch's reason for compiling again or nothing) of each compilation of the last call."""
        if not self._seconds:
            return []
        reasons = [metrics.recompile_reason or "" for metrics in get_compilation_metrics()[-len(self._seconds) :]]
        reasons = [""] * (len(self._seconds) - len(reasons)) + reasons
        return list(zip(self._seconds, map(_short, reasons), strict=True))

    def _started(self, _) -> None:
        if not self._watching or threading.get_ident() != self._thread:
            return
        self.since = time.perf_counter()
        self._tell()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, args=(self._over,), daemon=True)
        self._ticker.start()

    def _ended(self, _) -> None:
        if self.since is None or threading.get_ident() != self._thread:
            return
        self._seconds.append(time.perf_counter() - self.since)
        self.since = None
        self._over.set()
        if self._ticker is not None:  # its last report must not come behind this one, nor may it keep the run alive
            self._ticker.join()
            self._ticker = None
        self._tell()

    def _tick(self, over: threading.Event) -> None:
        while not over.wait(TICK):
            self._tell()


def _short(reason: str) -> str:
    """Torch's guard failure without the number of the graph in front and the place in torch behind."""
    return reason.partition(": ")[2].split("  #")[0].strip()[:120] or reason[:120]
