"""The client's connection to rank 0: one question at a time, and the memory of both directions."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .channel import GIVE_UP, POLL, TAKEN, Connection, ConnectionLost, connect
from .errors import Cancelled, WorkerError, cause_of
from .protocol import Block, Message, Payload, as_it_lies, decode
from .shared_memory import GrowingBuffer, LentAnswers, SharedMemory

GIVE_UP_WITHIN = 5.0  # seconds for rank 0 to ask the others where they are


class Overdue(Exception):
    """No answer within the caller's timeout."""


class Patience:
    """Called about every 50 ms while the client waits: raises what ends the waiting."""

    def __init__(self, cancelled: Callable[[], bool] | None) -> None:
        self._cancelled = cancelled
        self._deadline: float | None = None

    def limit(self, timeout: float | None) -> None:
        self._deadline = None if timeout is None else time.monotonic() + timeout

    def __call__(self) -> None:
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("the call was cancelled")
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise Overdue


class Line:
    """hello: what rank 0 said of itself and the others. memory: bytes of each rank after the latest call.

    Every method raises ConnectionLost where the ranks are gone; close() then, and open() again. One thread at a time
    uses the line; state() and hang_up() are for any other one, too.
    """

    def __init__(self, address: Path, key: bytes) -> None:
        self.address = address
        self.hello: dict = {}
        self.memory: list[int] = []
        self._key = key
        self._connection: Connection | None = None
        self._hung_up = False
        self._owed = False  # an answer to a question that was left
        self._left = 0.0  # when that was, by time.monotonic()
        self._outbox = GrowingBuffer()
        self._answers = LentAnswers()

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def open(self, look: Callable[[], None]) -> None:
        """Raises OSError where no rank 0 listens yet, WorkerError where it has another client."""
        connection = connect(self.address, self._key, look)
        try:
            while not connection.poll(POLL):
                look()
            hello, _ = connection.receive()
            if hello == TAKEN:
                raise WorkerError(
                    f"the group at {self.address} has another client, and can have one only; let it go there (Stop "
                    "all in its panel, or end that program), or start a group of your own"
                )
            self.hello = hello
            if self._hung_up:
                raise ConnectionLost("another thread has hung up")
        except BaseException:
            connection.close()
            raise
        self._connection = connection

    @property
    def left_for(self) -> float:
        """Seconds since the question was left to whose answer settle() waits, 0 where there is none."""
        return time.monotonic() - self._left if self._owed else 0.0

    def settle(self, look: Callable[[], None]) -> None:
        """Ready for a question: the answer to one that was left is awaited and thrown away."""
        if self._owed:
            self._await(look)
            self._take()
            self._answers.settle()
        elif self._connected().poll(0):
            raise ConnectionLost("the ranks were lost between two calls")

    def ask(self, method: str, message: Message, look: Callable[[], None]) -> Payload:
        """Raises WorkerError where a rank raised; what look raises leaves the question to settle()."""
        buffer, new = self._outbox.reserve(message.size)
        message.write(buffer)
        shared = [_filled(block) for block in message.shared]
        memories = [self._outbox.memory, *shared] if new else shared
        request = {"method": method, "size": message.size, "buffer": self._outbox.memory.size if new else 0}
        request |= {"shared": [memory.size for memory in shared], "lent": self._answers.lent()}
        try:
            self._connected().send(request, [memory.descriptor for memory in memories])
            self._owed = True
            self._await(look)
        finally:
            self._left = time.monotonic()
            for memory in shared:
                memory.close()
        frame = self._take()
        if not frame["ok"]:
            raise _error(method, frame)
        answer, ours = self._answers.message(frame["answer"], frame["size"])
        result = decode(answer, [], own=as_it_lies if ours else torch.clone)
        self._answers.settle()
        return result

    def give_up(self) -> str | None:
        """Instead of settle(): has the ranks replaced, and closes. Where they were; None where rank 0 does not hear."""
        deadline = time.monotonic() + GIVE_UP_WITHIN
        try:
            self._connected().send(GIVE_UP)
            while not self._connected().poll(POLL):
                if time.monotonic() > deadline:
                    return None
            return self._take().get("stacks", "")
        except ConnectionLost:
            return None
        finally:
            self.close()

    def state(self) -> str:
        """busy, idle, or starting: there is no connection, or it has ended."""
        connection = self._connection
        try:
            ended = connection is None or (not self._owed and connection.poll(0))
            return "starting" if ended else "busy" if self._owed and not connection.poll(0) else "idle"
        except ConnectionLost:  # closed meanwhile by the thread that uses it
            return "starting"

    def hang_up(self) -> None:
        """For good: who waits here gets ConnectionLost, and still holds the memory of the call until close()."""
        self._hung_up = True
        if (connection := self._connection) is not None:
            with contextlib.suppress(OSError):
                connection.line.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None
        self._owed = False
        self._outbox.close()
        self._answers.close()

    def _await(self, look: Callable[[], None]) -> None:
        while not self._connected().poll(POLL):
            look()

    def _connected(self) -> Connection:
        if self._connection is None or self._hung_up:
            raise ConnectionLost("the line was closed by its owner")
        return self._connection

    def _take(self) -> dict:
        frame, descriptors = self._connected().receive()
        self._owed = False
        self._outbox.settle()
        self.memory = frame["memory"] or self.memory
        for descriptor in descriptors:
            self._answers.replace(frame["answer"], SharedMemory.received(descriptor, frame["buffer"]))
        if frame.get("leaving"):
            self.close()  # the ranks are out of step: new ones are on their way
        return frame


def _error(method: str, frame: dict) -> WorkerError:
    rank, error, stacks = frame["rank"], frame["error"], frame.get("stacks", "")
    if why := frame.get("hangs"):
        who = "all ranks hang" if rank is None else f"rank {rank} hangs"
        return WorkerError(f"{who} in {method}: {why}; new ones are started", rank=rank, details=stacks)
    details = f"{error}\n{stacks}" if stacks else error
    return WorkerError(f"rank {rank} raised in {method}: {cause_of(error)}", rank=rank, details=details)


def _filled(block: Block) -> SharedMemory:
    memory = SharedMemory.create(block.size)
    block.write(memory.mapped())
    return memory
