"""What each rank says after a call, and the watch for a call in which one rank has failed while others hang."""

from __future__ import annotations

import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist

from .root_store import LeadersStore

ABANDONED = 70  # exit code
INTERVAL = 0.2
MAX_TRACEBACK = 16_000  # characters


@dataclass
class Status:
    """sequences: how many collectives the rank has entered, by process group; ranks that differ are out of step."""

    rank: int
    error: str | None = None
    memory_bytes: int = 0
    sequences: dict[str, int] = field(default_factory=dict)

    @classmethod
    def now(cls, rank: int, device: torch.device, error: str | None = None) -> Status:
        return cls(rank, error, memory_bytes(device), sequences())

    as_dict = asdict


def memory_bytes(device: torch.device) -> int:
    """What the rank holds of its device: the allocator's reserve on CUDA, resident memory on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device)
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def sequences() -> dict[str, int]:
    groups = dist.distributed_c10d._world.pg_names
    return {str(name): int(group._get_sequence_number_for_group()) for group, name in groups.items()}


def in_step(statuses: list[Status]) -> bool:
    """Whether after a failure no rank has entered a collective that another one has not.

    If one has, the next call would meet its leftovers: wrong numbers instead of an error.
    """
    seen: dict[str, int] = {}
    return all(seen.setdefault(name, count) == count for one in statuses for name, count in one.sequences.items())


def formatted(error: BaseException) -> str:
    """The traceback, shortened in the middle; the error keeps no frames, and with them tensors, alive."""
    text = "".join(traceback.format_exception(error))
    traceback.clear_frames(error.__traceback__)
    error.__traceback__ = None
    if len(text) > MAX_TRACEBACK:
        text = f"{text[: MAX_TRACEBACK // 2]}\n...\n{text[-MAX_TRACEBACK // 2 :]}"
    return text


class FailureWatch:
    """Runs in rank 0: once a rank has reported a failure, the call may take `grace` seconds more.

    A rank that raised inside a collective leaves the others waiting in it. report(rank, error) then tells the client,
    and the process ends, so that the agent replaces all ranks.
    """

    def __init__(self, store: LeadersStore, grace: float, report: Callable[[int, str], None]) -> None:
        self._store = store
        self._grace = grace
        self._report = report
        self._call: int | None = None
        self.lock = threading.Lock()  # held while a call's answer is sent
        threading.Thread(target=self._run, name="para-failures", daemon=True).start()

    def begin(self, call: int) -> None:
        with self.lock:
            self._call = call

    def end(self) -> None:
        """With the lock held."""
        self._call = None

    def _run(self) -> None:
        failed_call, since = None, 0.0
        while True:
            time.sleep(INTERVAL)
            call = self._call
            if call is None or not self._store.check(failure_key(call)):
                continue
            if call != failed_call:
                failed_call, since = call, time.monotonic()
            elif time.monotonic() - since > self._grace:
                with self.lock:
                    if self._call == call:
                        # By this thread's own store: the main thread may wait with the other one.
                        self._report(*json.loads(self._store.get(failure_key(call))))
                        os._exit(ABANDONED)


def failure_key(call: int) -> str:
    return f"failed/{call}"
