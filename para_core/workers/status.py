"""What each rank says after a call."""

from __future__ import annotations

import os
import re
import traceback
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist

ABANDONED = 70  # exit code
MAX_TRACEBACK = 16_000  # characters


@dataclass
class Status:
    """sequences: how many collectives the rank has entered, by process group; ranks that differ are out of step.

    harmless: of a rank that raised, whether its device can be used as before.
    """

    rank: int
    error: str | None = None
    harmless: bool = True
    memory_bytes: int = 0
    sequences: dict[str, int] = field(default_factory=dict)

    @classmethod
    def now(cls, rank: int, device: torch.device, error: str | None = None, *, harmless: bool = True) -> Status:
        return cls(rank, error, harmless, memory_bytes(device), sequences())

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


# What torch's own checks and a service's raise before anything goes wrong on a device.
HARMLESS = (ValueError, NotImplementedError, torch.OutOfMemoryError)
OF_A_DEVICE = re.compile(r"\b(CUDA|HIP|cuBLAS|cuDNN|NCCL) (error|failure)|_STATUS_|device-side assert", re.IGNORECASE)


def is_harmless(error: BaseException) -> bool:
    """Whether a CUDA context is as before: of these types exactly, and no error of the device behind it.

    After an illegal access or a failed assertion in a kernel the context answers every later call with that error,
    at whatever comes first: as a torch.AcceleratorError, a RuntimeError, or what a library makes of it.
    """
    if type(error) not in HARMLESS:
        return False
    link: BaseException | None = error
    while link is not None:
        of_memory = type(link) is torch.OutOfMemoryError  # its text may name the CUDA error of the allocation
        if not of_memory and (type(link).__name__ == "AcceleratorError" or OF_A_DEVICE.search(str(link))):
            return False  # by name: torch has that type since 2.8
        link = link.__cause__ or link.__context__
    return True


def usable(statuses: list[Status], device_type: str) -> bool:
    """Whether after a failure the ranks can be asked again; else new ones are needed.

    On CUDA all must have raised, and harmlessly: of NCCL's point-to-point messages the counts say nothing, and one
    that nobody received would be taken for one of the next call.
    """
    if not in_step(statuses):
        return False
    return device_type == "cpu" or all(status.error is not None and status.harmless for status in statuses)


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
