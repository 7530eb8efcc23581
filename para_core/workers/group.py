"""The client of a group: start, call, close."""

from __future__ import annotations

import atexit
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from .channel import POLL, ConnectionLost
from .config import GroupConfig
from .describe import describe
from .errors import WorkerError, closed
from .launch import LocalGroup
from .line import Line, Overdue, Patience
from .losses import Losses
from .protocol import Message, Payload
from .recovery import Recovery


class WorkerGroup:
    """A group of ranks that stays up between calls; start() or attached.attach() gives one.

    config: as given to start(); of an attached group only its devices are known, one a rank.
    recover: called after a restart, before the interrupted call is sent again or a new one is made. It brings the
    ranks back to the session's state, usually by calls of its own on this group.
    Calls of several threads wait for each other.
    """

    def __init__(self, line: Line, losses: Losses, config: GroupConfig, local: LocalGroup | None = None) -> None:
        self.config = config
        self._recovery = Recovery(line)
        self._line = line
        self._losses = losses
        self._local = local
        self._lock = threading.RLock()
        self._closing = threading.RLock()
        self._closed = False
        atexit.register(self.close)

    @classmethod
    def start(
        cls,
        config: GroupConfig,
        *,
        cancelled: Callable[[], bool] | None = None,
        made: Callable[[WorkerGroup], None] | None = None,
    ) -> WorkerGroup:
        """Starts the ranks and returns when all are ready, in some seconds: each imports torch.

        made: given the group before its ranks are ready, when only its state() and close() are of use.
        Raises WorkerError where a rank does not start, with what it wrote, or the group is closed meanwhile; what
        `cancelled` raises, or Cancelled. Nothing is left of the group then.
        """
        local = LocalGroup(config)
        line = Line(local.directory.socket, local.directory.key())
        group = cls(line, Losses(local, config.max_restarts), config, local)
        if made is not None:
            made(group)
        group.join(cancelled)
        return group

    @property
    def recover(self) -> Callable[[], None] | None:
        return self._recovery.how

    @recover.setter
    def recover(self, how: Callable[[], None] | None) -> None:
        self._recovery.how = how

    @property
    def address(self) -> Path:
        return self._line.address

    @property
    def alive(self) -> bool:
        """Whether calls are possible; ranks may be starting."""
        return not self._closed and (self._local is None or self._local.alive)

    @property
    def connected(self) -> bool:
        """Whether the ranks are there, as far as is known: a call need not wait for new ones."""
        return self.alive and self._line.is_open

    def call(
        self,
        method: str,
        payload: Payload = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        timeout: float | None = None,
        renew: bool = True,
    ) -> Payload:
        """Runs the service's method on every rank with the same payload; rank 0's result, tensors on the CPU.

        cancelled: asked every 50 ms; where it returns true (Cancelled) or raises, the call is left at once: the ranks
        finish it, and the next call waits for that, for collective_timeout at most: ranks that take longer are
        replaced. timeout: seconds for the ranks' work; then they are replaced.
        A lost rank is replaced, `recover` called and the payload sent again, max_restarts times in a row; with renew
        False that is left to the next call, and a WorkerError raised.
        Raises WorkerError with rank and traceback where a rank raised or hangs (the group stays usable, perhaps with
        new ranks; the call is not made again), or is lost for good (the group is closed then); ValueError for a
        payload that cannot travel.
        """
        if not method.isidentifier() or method.startswith("_"):
            raise ValueError(f"method={method!r} cannot be called; give the name of a public method of the service")
        message = Message(payload)
        with self.turn(cancelled):
            if not (renew or self._recovery.is_done):
                raise WorkerError(f"the ranks are new, and {method} was not to wait for what they lack")
            while True:
                try:
                    return self._attempt(method, message, cancelled, timeout)
                except ConnectionLost as lost:
                    self._line.close()
                    if self._closed:
                        raise closed() from lost
                    if self._recovery.is_running:
                        raise  # to the call that recovers, which begins again
                    self._or_close(self._losses.count, lost)
                    if not renew:
                        raise self._losses.latest from lost

    def state(self) -> dict:
        """For people: {"address", "restarts", "ranks": [...]}, each rank as describe gives it."""
        return describe(self._line, self._losses, self._local if self.alive else None, alive=self.alive)

    def close(self) -> None:
        """Ends the ranks of a group that was started here; leaves one that was attached to its owner.

        What another thread waits for in a call ends with a WorkerError.
        """
        with self._closing:  # a second caller returns when nothing is left, too
            if self._closed:
                return
            self._closed = True
            atexit.unregister(self.close)
            self._line.hang_up()
            self._close_line()
            if self._local is not None:
                self._local.close()

    def join(self, cancelled: Callable[[], bool] | None) -> None:
        """Once, before the first call: waits until all ranks are ready. Closes the group where that does not come."""
        try:
            with self.turn(cancelled):
                self._connect(Patience(cancelled))
                self._recovery.note()
        except BaseException:
            self.close()
            raise

    @contextlib.contextmanager
    def turn(self, cancelled: Callable[[], bool] | None = None) -> Iterator[None]:
        """Within the context no other thread's call comes between this one's. Raises what `call` does while it waits.

        cancelled: as for `call`.
        """
        look = Patience(cancelled)
        while not self._lock.acquire(timeout=POLL):
            look()
        try:
            if self._closed:
                raise closed()
            yield
        finally:
            self._lock.release()
            if self._closed:
                self._close_line()

    def _close_line(self) -> None:
        """Unless a call of another thread uses it, which does so then when it ends."""
        if self._lock.acquire(blocking=False):
            try:
                self._line.close()
            finally:
                self._lock.release()

    def _attempt(
        self, method: str, message: Message, cancelled: Callable[[], bool] | None, timeout: float | None
    ) -> Payload:
        look = Patience(cancelled)
        if self._line.is_open:
            self._settle(look)
        if not self._line.is_open:
            self._connect(look)
        self._recovery.run()
        look.limit(timeout)
        try:
            answer = self._line.ask(method, message, look)
        except Overdue:
            overdue = f"no answer to {method} within {timeout:g} s; the ranks are replaced"
            raise WorkerError(overdue, details=self._replace()) from None
        except WorkerError as error:
            self._losses.latest = error
            raise
        if not self._recovery.is_running:
            self._losses.forget()
        return answer

    def _settle(self, look: Patience) -> None:
        """What nobody wants any longer is worth no more waiting than new ranks are."""
        look.limit(self.config.collective_timeout - self._line.left_for)
        try:
            self._line.settle(look)
        except Overdue:
            self._losses.note_hung(self.config.collective_timeout, self._replace())
        finally:
            look.limit(None)

    def _connect(self, look: Patience) -> None:
        """Waits for ranks that start. Raises WorkerError, with the group closed, where they will not come."""
        deadline = time.monotonic() + self.config.start_timeout

        def wait() -> None:
            look()
            if self._closed:  # by another thread
                raise closed()
            self._or_close(self._losses.check_start)
            if time.monotonic() > deadline:
                error = self._losses.not_ready(self.address, self.config.start_timeout)
                self.close()
                raise error

        while not self._line.is_open:
            wait()
            try:
                self._line.open(wait)
            except OSError:
                time.sleep(POLL)
        self._losses.all_ready()

    def _or_close(self, check: Callable[..., None], *arguments: object) -> None:
        try:
            check(*arguments)
        except (WorkerError, FileNotFoundError):
            if self._closed:  # meanwhile, by another thread: no rank is to blame, and the group's files are gone
                raise closed() from None
            self.close()
            raise

    def _replace(self) -> str:
        """New ranks for those that hang; where they hang, which is worth more than that they do."""
        stacks = self._line.give_up()
        if stacks is None and self._local is not None:
            self._local.kill_ranks()
        return stacks or ""
