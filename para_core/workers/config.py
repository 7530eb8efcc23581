"""What a group is made of; checked before a process is started."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import timedelta

import torch

BACKENDS = ("auto", "gloo", "nccl")
SERVICE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class WorkerContext:
    """What a service is made with: Factory(context). The default process group holds all ranks."""

    rank: int
    world_size: int
    device: torch.device


@dataclass(frozen=True)
class GroupConfig:
    """One rank for each of devices, which runs service.

    service: "package.module:Factory". sys_path: folders from which the ranks import, before everything else, in their
    order; this pack's own follows them. environment: set for the ranks on top of this process's. num_threads: of a
    rank on the CPU. Times are seconds: start_timeout until all ranks are ready; collective_timeout of the process
    group (NCCL's has call_timeout), for the other ranks once one has finished a call, and for a call that its caller
    has left; call_timeout for a call in which no rank finishes or enters a collective (a step may take many minutes,
    and a compilation too); heartbeat_timeout until a rank that gives no sign of life counts as dead, half of
    start_timeout while it starts; failure_grace for the other ranks once one has raised. max_restarts: how many losses
    of a rank in a row are made good before an error.
    """

    devices: tuple[str, ...]
    service: str
    backend: str = "auto"
    sys_path: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    num_threads: int = 1
    start_timeout: float = 120.0
    collective_timeout: float = 600.0
    call_timeout: float = 3600.0
    heartbeat_timeout: float = 20.0
    failure_grace: float = 5.0
    max_restarts: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "devices", tuple(self.devices))
        object.__setattr__(self, "sys_path", tuple(self.sys_path))
        kinds = {torch.device(device).type for device in self.devices}
        if len(kinds) != 1 or kinds - {"cpu", "cuda"}:
            raise ValueError(
                f"devices={self.devices} cannot form a group; name one or more of one kind, "
                'such as ("cuda:0", "cuda:1") or ("cpu", "cpu")'
            )
        needed = {"auto": kinds, "nccl": {"cuda"}, "gloo": {"cpu"}}
        if kinds != needed.get(self.backend):  # gloo has no point-to-point messages of CUDA tensors
            raise ValueError(f"backend={self.backend!r} on {sorted(kinds)[0]}; use 'auto', which is nccl with CUDA")
        if not SERVICE.fullmatch(self.service):
            raise ValueError(f"service={self.service!r} is no import path; write 'package.module:Factory'")
        if self.num_threads < 1 or self.max_restarts < 0:
            raise ValueError(
                f"num_threads={self.num_threads}, max_restarts={self.max_restarts}; "
                "a rank needs at least one thread, and restarts cannot be negative"
            )
        times = ("start_timeout", "collective_timeout", "call_timeout", "heartbeat_timeout", "failure_grace")
        if wrong := [f"{name}={getattr(self, name)}" for name in times if not getattr(self, name) > 0]:
            raise ValueError(f"{', '.join(wrong)}; times are seconds above 0")

    @property
    def process_group_timeout(self) -> timedelta:
        """NCCL counts from the moment a collective is queued, which may be a whole call ahead of the device."""
        cuda = self.devices[0].startswith("cuda")
        return timedelta(seconds=self.call_timeout if cuda else self.collective_timeout)

    @property
    def process_group_backend(self) -> str:
        """As init_process_group takes it. CPU tensors always go by gloo."""
        cuda = self.devices[0].startswith("cuda")
        return "cpu:gloo,cuda:nccl" if cuda else "gloo"
