"""What each rank says after a call."""

from __future__ import annotations

import os
import traceback
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist

ABANDONED = 70  # exit code
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
    groups = list(dist.distributed_c10d._world.pg_names.items())  # a copy: another thread may make one
    return {str(name): int(group._get_sequence_number_for_group()) for group, name in groups}


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
    return shortened(text)


def shortened(text: str) -> str:
    if len(text) > MAX_TRACEBACK:
        text = f"{text[: MAX_TRACEBACK // 2]}\n...\n{text[-MAX_TRACEBACK // 2 :]}"
    return text
