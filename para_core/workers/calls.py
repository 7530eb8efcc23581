"""How one call reaches every rank and how they agree on its outcome; rank 0 leads."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from .call_watch import done_key, failure_key
from .ports import deaf_afterwards
from .root_store import ControlStore, LeadersStore
from .shared_memory import ReceivedBuffer, SharedMemory
from .status import Status

CHUNK = 1 << 28  # bytes broadcast at once


class Rounds:
    """The control store's keys: call/<n> from rank 0, done/<n>/<rank> from each, failed/<n> from who fails."""

    def __init__(self, store: LeadersStore, rank: int, world_size: int) -> None:
        self._store = store
        self.rank = rank
        self.world_size = world_size

    def announce(self, call: int, order: dict) -> None:
        self._store.set(f"call/{call}", json.dumps(order))

    def await_order(self, call: int) -> dict:
        return json.loads(self._store.get(f"call/{call}"))

    def fail(self, call: int, error: str) -> None:
        """At once, before the others are done: the watch in rank 0 counts from here. The first error is kept."""
        self._store.set_first(failure_key(call), json.dumps([self.rank, error]))

    def first_failure(self, call: int) -> tuple[int, str]:
        rank, error = json.loads(self._store.get(failure_key(call)))
        return rank, error

    def finish(self, call: int, status: Status) -> None:
        self._store.set(done_key(call, self.rank), json.dumps(status.as_dict()))

    def statuses(self, call: int) -> list[Status]:
        """Of every rank, once all have finished."""
        return [Status(**json.loads(self._store.get(done_key(call, rank)))) for rank in range(self.world_size)]

    def forget(self, call: int) -> None:
        for key in (f"call/{call}", *(done_key(call, rank) for rank in range(self.world_size))):
            self._store.delete(key)


class Memories:
    """The blocks of calls, on their way from rank 0 to the others.

    Ranks that can open rank 0's descriptors map its memory; the rest (other machines, other containers) receive a
    copy by broadcast.
    """

    def __init__(self, rank: int, inbox: ReceivedBuffer) -> None:
        self._rank = rank
        self._inbox = inbox
        self._generation = -1
        self._carrier: dist.ProcessGroup | None = None
        self._maps = True

    def agree(self, store: ControlStore, world_size: int, timeout: timedelta) -> None:
        """Finds out who can map: by a probe in rank 0's memory. timeout: of a broadcast to the others."""
        if self._rank == 0:
            secret = secrets.token_bytes(16)
            probe = SharedMemory.create(len(secret))
            probe.mapped().copy_(torch.frombuffer(bytearray(secret), dtype=torch.uint8))
            store.set("probe", json.dumps([os.getpid(), probe.descriptor, secret.hex()]))
        else:
            pid, descriptor, secret_hex = json.loads(store.get("probe"))
            self._maps = _opened(pid, descriptor, 16) == bytes.fromhex(secret_hex)
        store.set(f"maps/{self._rank}", "1" if self._maps else "0")
        far = [rank for rank in range(1, world_size) if store.get(f"maps/{rank}") == "0"]
        if self._rank == 0:
            probe.close()
        if far:
            with deaf_afterwards():
                self._carrier = dist.new_group([0, *far], timeout=timeout, backend="gloo")

    def send(self, size: int, shared: list[SharedMemory]) -> None:
        """On rank 0, after the order."""
        if self._carrier is not None:
            for memory in (self._inbox.message(size), *(block.mapped() for block in shared)):
                _broadcast(memory, self._carrier)

    def receive(self, order: dict, *, private: bool) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """On the other ranks: the message, private as in `ReceivedBuffer.message`, and its shared blocks."""
        if self._maps:
            self._map_inbox(order)
            return self._inbox.message(order["size"], private=private), list(self._mapped(order))
        if self._carrier is None:
            raise RuntimeError("rank 0's memory can no longer be opened")
        blocks = [
            torch.empty(size, dtype=torch.uint8) for size in (order["size"], *(size for _, size in order["shared"]))
        ]
        for block in blocks:
            _broadcast(block, self._carrier)
        return blocks[0], blocks[1:]

    def _map_inbox(self, order: dict) -> None:
        descriptor, size, generation = order["inbox"]
        if generation != self._generation:
            self._inbox.replace(SharedMemory.received(_open(order["pid"], descriptor), size))
            self._generation = generation

    @staticmethod
    def _mapped(order: dict) -> Iterator[torch.Tensor]:
        for descriptor, size in order["shared"]:
            memory = SharedMemory.received(_open(order["pid"], descriptor), size)
            yield memory.mapped(private=True)
            memory.close()


def _open(pid: int, descriptor: int) -> int:
    return os.open(f"/proc/{pid}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)


def _opened(pid: int, descriptor: int, size: int) -> bytes | None:
    try:
        opened = _open(pid, descriptor)
    except OSError:
        return None
    try:
        return os.pread(opened, size, 0)
    except OSError:
        return None
    finally:
        os.close(opened)


def _broadcast(memory: torch.Tensor, group: dist.ProcessGroup) -> None:
    for piece in memory.split(CHUNK) if memory.numel() else ():
        dist.broadcast(piece, src=0, group=group)
