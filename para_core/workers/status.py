"""What each rank says after a call."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

import torch
import torch.distributed as dist

ABANDONED = 70  # exit code
MAX_TRACEBACK = 16_000  # characters


@dataclass
class Status:
    """sequences: how many collectives the rank has entered, by process group; ranks that differ are out of step.

    harmless: of a rank that raised, whether its device and its connections can be used as before.
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
# DistError covers the stores and NCCL; what gloo raises has no type of its own.
OF_THE_TRANSPORT = re.compile(r"\bgloo/|\bGloo connect|pair closure|closed by peer|Timed out waiting", re.IGNORECASE)
OF_A_DEVICE = re.compile(r"\b(CUDA|HIP|cuBLAS|cuDNN|NCCL) (error|failure)|_STATUS_|device-side assert", re.IGNORECASE)


def is_harmless(error: BaseException, device_type: str) -> bool:
    """Whether a rank is as before: no error of the ranks' connections behind it, and on CUDA none of the device.

    A connection that timed out or lost its other end answers every later message with an error. On CUDA only errors of
    the types above are harmless: after an illegal access or a failed assertion in a kernel the context answers every
    later call with that error, at whatever comes first: as a torch.AcceleratorError, a RuntimeError, or what a library
    makes of it.
    """
    if device_type == "cpu":
        return not any(map(_of_the_transport, _links(error)))
    return type(error) in HARMLESS and not any(_of_the_transport(link) or _of_a_device(link) for link in _links(error))


def _links(error: BaseException) -> Iterator[BaseException]:
    """The error and those behind it."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _of_the_transport(error: BaseException) -> bool:
    return isinstance(error, dist.DistError) or OF_THE_TRANSPORT.search(str(error)) is not None


def _of_a_device(error: BaseException) -> bool:
    if type(error) is torch.OutOfMemoryError:  # its text may name the CUDA error of the allocation
        return False
    # by name: torch has that type since 2.8
    return type(error).__name__ == "AcceleratorError" or OF_A_DEVICE.search(str(error)) is not None


def usable(statuses: list[Status], device_type: str) -> bool:
    """Whether after a failure the ranks can be asked again; else new ones are needed.

    What was raised must be harmless. On CUDA all must have raised, too: of NCCL's point-to-point messages the counts
    say nothing, and one that nobody received would be taken for one of the next call.
    """
    if not in_step(statuses) or not all(status.harmless for status in statuses):
        return False
    return device_type == "cpu" or all(status.error is not None for status in statuses)


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
