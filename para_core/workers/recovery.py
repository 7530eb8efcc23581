"""Whether the ranks that are there have the session's state, and how new ones get it."""

from __future__ import annotations

from collections.abc import Callable

from .channel import ConnectionLost
from .line import Line


class Recovery:
    """Belongs to one line; used by whoever has the group's turn.

    how: brings new ranks to the session's state, usually by calls on the group; None where there is none.
    is_running: `how` is at work; the calls that it makes must not wait for it.
    """

    def __init__(self, line: Line) -> None:
        self.how: Callable[[], None] | None = None
        self.is_running = False
        self._line = line
        self._incarnation: str | None = None  # of the ranks that have the state

    @property
    def is_done(self) -> bool:
        return self._line.is_open and self._incarnation == self._line.hello["incarnation"]

    def note(self) -> None:
        """The ranks that are there have the state."""
        self._incarnation = self._line.hello["incarnation"]

    def run(self) -> None:
        """Once for every set of new ranks. Raises what `how` raises, or ConnectionLost where they were lost again."""
        incarnation = self._line.hello["incarnation"]
        if self.is_running or self._incarnation == incarnation:
            return
        if self.how is not None:
            self.is_running = True
            try:
                self.how()
            finally:
                self.is_running = False
        if not self._line.is_open or self._line.hello["incarnation"] != incarnation:
            raise ConnectionLost("the ranks were lost again while they recovered")
        self._incarnation = incarnation
