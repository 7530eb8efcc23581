"""The client's end of a group: start or attach, call, close."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from .channel import Connection, ConnectionLost, connect
from .config import GroupConfig
from .errors import Cancelled, WorkerError
from .launch import LocalGroup
from .protocol import Message, Payload, decode
from .shared_memory import GrowingBuffer, ReceivedBuffer, SharedMemory

POLL = 0.05  # seconds between two looks at `cancelled`
logger = logging.getLogger(__name__)


class WorkerGroup:
    """A group of ranks that stays up between calls; start() or attach() gives one.

    recover: called after a restart, before the interrupted call is sent again or a new one is made. It brings the
    ranks back to the session's state, usually by calls of its own on this group.
    Calls of several threads wait for each other.
    """

    def __init__(self, address: Path, key: bytes, config: GroupConfig, local: LocalGroup | None) -> None:
        self.address = address
        self.config = config
        self.recover: Callable[[], None] | None = None
        self._key = key
        self._local = local
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._hello: dict = {}
        self._recovered: str | None = None  # the incarnation that has the session's state
        self._recovering = False
        self._failures = 0  # lost ranks in a row
        self._seen_deaths = 0
        self._owed = False  # an answer that nobody waits for any more
        self._outbox = GrowingBuffer()
        self._inbox = ReceivedBuffer()
        self._memory: list[int] = []
        self._last_error: tuple[int | None, str] = (None, "")
        self._closed = False
        atexit.register(self.close)

    @classmethod
    def start(cls, config: GroupConfig, *, cancelled: Callable[[], bool] | None = None) -> WorkerGroup:
        """Starts the ranks and returns when all are ready.

        Raises WorkerError where a rank does not start, with what it wrote; what `cancelled` raises, or Cancelled.
        Nothing is left of the group then.
        """
        local = LocalGroup(config)
        group = cls(local.directory.socket, local.directory.key(), config, local)
        try:
            with group._turn(cancelled):
                group._connect(cancelled)
                group._recovered = group._hello["incarnation"]
        except BaseException:
            group.close()
            raise
        return group

    @property
    def alive(self) -> bool:
        return not self._closed and (self._local is None or self._local.alive)

    def call(
        self,
        method: str,
        payload: Payload = None,
        *,
        cancelled: Callable[[], bool] | None = None,
        timeout: float | None = None,
    ) -> Payload:
        """Runs the service's method on every rank with the same payload; rank 0's result, tensors on the CPU.

        cancelled: asked every 50 ms; where it returns true (Cancelled) or raises, the call is left at once: the ranks
        finish it, and the next call waits for that. timeout: seconds for the ranks' work; then they are replaced.
        A lost rank is replaced, `recover` called and the payload sent again, max_restarts times in a row.
        Raises WorkerError with rank and traceback where a rank raised (the group stays usable), or is lost for good
        (the group is closed then); ValueError for a payload that cannot travel.
        """
        message = Message(payload)
        with self._turn(cancelled):
            while True:
                try:
                    self._prepare(cancelled)
                    answer = self._ask(method, message, cancelled, timeout)
                    if not self._recovering:
                        self._failures = 0
                    return answer
                except ConnectionLost as lost:
                    self._drop()
                    if self._recovering:
                        raise  # to the call that recovers, which begins again
                    self._count(lost)

    def state(self) -> dict:
        """For people: address, restarts, and for each rank its device, pid, state, memory, error and last lines."""
        connection = self._connection
        pids = self._local.pids() if self._local else {}
        peers = self._hello.get("ranks") or [{"pid": None, "device": device} for device in self.config.devices]
        ranks = []
        for rank, peer in enumerate(peers):
            pid = pids.get(rank) if self._local else peer["pid"]
            state = "lost" if not self.alive or (self._local and pid is None) else "starting"
            if state != "lost" and connection is not None:
                state = "busy" if self._is_busy(connection) else "idle"
            ranks.append(
                {
                    "rank": rank,
                    "device": peer["device"],
                    "pid": pid,
                    "state": state,
                    "memory_bytes": self._memory[rank] if rank < len(self._memory) else 0,
                    "error": self._last_error[1] if self._last_error[0] == rank else "",
                    "log": self._local.directory.last_lines(rank) if self._local else [],
                }
            )
        return {"address": str(self.address), "restarts": self._hello.get("restarts", 0), "ranks": ranks}

    def close(self) -> None:
        """Ends the ranks of a group that was started here; leaves one that was attached to its owner."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self.close)
        self._drop()
        if self._local is not None:
            self._local.close()

    # One call

    @contextlib.contextmanager
    def _turn(self, cancelled: Callable[[], bool] | None) -> Iterator[None]:
        while not self._lock.acquire(timeout=POLL):
            _check(cancelled)
        try:
            if self._closed:
                raise WorkerError("the group is closed; start another one")
            yield
        finally:
            self._lock.release()

    def _prepare(self, cancelled: Callable[[], bool] | None) -> None:
        """Connected, nothing owed, and the session's state on the ranks."""
        if self._connection is not None and self._owed:
            self._await_answer(cancelled, None)
            self._take_answer()
        if self._connection is not None and self._connection.poll(0):
            raise ConnectionLost("the group was lost between two calls")
        if self._connection is None:
            self._connect(cancelled)
        if self._recovered == self._hello["incarnation"] or self._recovering:
            return
        if self.recover is not None:
            self._recovering = True
            try:
                self.recover()
            finally:
                self._recovering = False
        self._recovered = self._hello["incarnation"]

    def _ask(
        self, method: str, message: Message, cancelled: Callable[[], bool] | None, timeout: float | None
    ) -> Payload:
        buffer, new = self._outbox.reserve(message.size)
        message.write(buffer)
        shared = [_filled(block) for block in message.shared]
        try:
            memories = [self._outbox.memory, *shared] if new else shared
            request = {"method": method, "size": message.size, "buffer": self._outbox.memory.size if new else 0}
            request["shared"] = [memory.size for memory in shared]
            self._connection.send(request, [memory.descriptor for memory in memories])
            self._owed = True
            self._await_answer(cancelled, timeout)
        finally:
            for memory in shared:
                memory.close()
        frame = self._take_answer()
        if not frame["ok"]:
            self._raise(method, frame)
        return decode(self._inbox.message(frame["size"]), [], own=torch.clone)

    def _await_answer(self, cancelled: Callable[[], bool] | None, timeout: float | None) -> None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not self._connection.poll(POLL):
            _check(cancelled)
            if deadline is not None and time.monotonic() > deadline:
                self._give_up(timeout)

    def _take_answer(self) -> dict:
        frame, descriptors = self._connection.receive()
        self._owed = False
        self._memory = frame["memory"] or self._memory
        for descriptor in descriptors:
            self._inbox.replace(SharedMemory.received(descriptor, frame["buffer"]))
        if frame.get("leaving"):
            self._drop()
        return frame

    def _raise(self, method: str, frame: dict) -> None:
        self._last_error = frame["rank"], frame["error"]
        raise WorkerError(f"rank {frame['rank']} raised in {method}:", rank=frame["rank"], details=frame["error"])

    def _give_up(self, timeout: float) -> None:
        """The ranks hang: where they do is worth more than that they do."""
        details = ""
        if self._local is not None:
            details = self._local.stacks()
            self._local.kill_ranks()
        self._drop()
        raise WorkerError(f"the ranks gave no answer within {timeout:g} s and were replaced", details=details)

    # Loss and return

    def _connect(self, cancelled: Callable[[], bool] | None) -> None:
        deadline = time.monotonic() + self.config.start_timeout
        while True:
            _check(cancelled)
            self._check_start(deadline)
            try:
                connection = connect(self.address, self._key)
            except OSError:
                time.sleep(POLL)
                continue
            try:
                while not connection.poll(POLL):
                    _check(cancelled)
                    self._check_start(deadline)
                self._hello, _ = connection.receive()
            except ConnectionLost:
                connection.close()
                continue
            except BaseException:
                connection.close()
                raise
            self._connection = connection
            if self._local is not None:
                self._seen_deaths = len(self._local.directory.deaths())
            return

    def _check_start(self, deadline: float) -> None:
        """Raises WorkerError where waiting longer is of no use."""
        if self._local is not None:
            if failure := self._local.failure_to_start():
                rank, text = failure
                self.close()
                raise WorkerError(f"rank {rank} did not start:", rank=rank, details=text)
            deaths = self._local.directory.deaths()[self._seen_deaths :]
            if len(deaths) > self.config.max_restarts:
                self.close()
                raise self._lost(deaths[-1])
        if time.monotonic() > deadline:
            self.close()
            raise WorkerError(f"the group at {self.address} was not ready within {self.config.start_timeout:g} s")

    def _count(self, lost: ConnectionLost) -> None:
        """Notes a loss; raises WorkerError when it is one too many in a row."""
        death = self._latest_death()
        error = self._lost(death) if death else WorkerError(f"the ranks were lost: {lost}")
        self._last_error = error.rank, str(error)
        self._failures += 1
        logger.warning("%s (loss %d in a row)", str(error).splitlines()[0], self._failures)
        if self._failures > self.config.max_restarts:
            self.close()
            raise error

    def _latest_death(self) -> dict | None:
        """The agent writes it down within moments."""
        deadline = time.monotonic() + 2.0
        while self._local is not None and time.monotonic() < deadline:
            deaths = self._local.directory.deaths()
            if len(deaths) > self._seen_deaths:
                first, self._seen_deaths = deaths[self._seen_deaths], len(deaths)
                return first
            time.sleep(0.02)
        return None

    def _lost(self, death: dict) -> WorkerError:
        rank = death["rank"]
        lines = "\n".join(self._local.directory.last_lines(rank)) if self._local.directory.path.exists() else ""
        return WorkerError(f"rank {rank} was lost: {death['cause']}", rank=rank, details=lines)

    def _is_busy(self, connection: Connection) -> bool:
        try:
            return self._owed and not connection.poll(0)
        except (OSError, ValueError):
            return False

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._owed = False
        self._outbox.close()
        self._inbox.close()


def attach(address: str | os.PathLike, *, start_timeout: float = 60.0) -> WorkerGroup:
    """A client of a group that the user started with torchrun; see __main__.py.

    address: the socket of its rank 0, which runs on this machine; the key lies beside it, as address.key.
    """
    path = Path(address)
    key = path.with_name(f"{path.name}.key")
    if not key.exists():
        raise ValueError(f"no group at {path}: {key} does not exist; start one there with torchrun --address {path}")
    config = GroupConfig(devices=("cpu",), service="attached:group", start_timeout=start_timeout)
    group = WorkerGroup(path, key.read_bytes(), config, None)
    try:
        with group._turn(None):
            group._connect(None)
            group._recovered = group._hello["incarnation"]
    except BaseException:
        group.close()
        raise
    return group


def _check(cancelled: Callable[[], bool] | None) -> None:
    if cancelled is not None and cancelled():
        raise Cancelled("the call was cancelled")


def _filled(block: object) -> SharedMemory:
    memory = SharedMemory.create(block.size)
    block.write(memory.mapped())
    return memory
