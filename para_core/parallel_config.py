"""Which devices a model runs on together, and how they share the work."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .attention import MeshRequest

BACKENDS = ("auto", "nccl", "gloo")
BATCH_PARALLEL = ("auto", "on", "off")


@dataclass(frozen=True)
class ParallelConfig:
    """What the user asks of the Context-Parallel Launcher.

    devices: one rank for each, such as ("cuda:0", "cuda:1"); the ranks of `attach_to` have devices of their own.
    ring_degree, ulysses_degree: 0 leaves the choice to the model's number of heads. batch_parallel: whether positive
    and negative prompt run on different halves of the devices: "auto" does where that is all there is to share.
    attach_to: address of a group that the user started; empty: one is started here.
    keep_loaded: leave the weights on the devices between runs, until the host wants the memory.
    """

    devices: tuple[str, ...]
    ring_degree: int = 0
    ulysses_degree: int = 0
    batch_parallel: str = "auto"
    backend: str = "auto"
    attach_to: str = ""
    keep_loaded: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("batch_parallel", BATCH_PARALLEL), ("backend", BACKENDS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f'{name} is "{getattr(self, name)}"; allowed are {", ".join(allowed)}.')
        kinds = {torch.device(device).type for device in self.devices}
        if len(kinds) > 1:
            raise ValueError(f"devices are of {len(kinds)} kinds ({', '.join(sorted(kinds))}); choose devices of one.")
        if self.attach_to and self.backend != "auto":
            raise ValueError(f"the group at {self.attach_to} has a backend of its own; leave this one at auto.")
        needed = {"nccl": {"cuda"}, "gloo": {"cpu"}}.get(self.backend, kinds)
        if kinds != needed:
            raise ValueError(
                f"backend {self.backend} needs {', '.join(needed)} devices, these are {', '.join(kinds)}; choose auto."
            )
        assert self.mesh is not None  # it has refused degrees below 0

    @property
    def group(self) -> tuple[str, tuple[str, ...]]:
        """What tells groups of processes apart: the address, or the devices, by which the backend is given too."""
        return self.attach_to, self.devices

    @property
    def mesh(self) -> MeshRequest:
        """What is asked of the mesh."""
        batch = {"auto": None, "on": True, "off": False}[self.batch_parallel]
        return MeshRequest(self.ring_degree, self.ulysses_degree, batch)


def check_alone(config: ParallelConfig, devices: str, there: torch.device) -> None:
    """Refuse what is lost where one device makes no processes, and the host itself computes.

    config: of one device. devices: as the user named it, empty where they did not. there: the device of the host.
    Raises ValueError for another device than the host's, and for degrees that one device cannot have.
    """
    chosen = torch.device(config.devices[0])
    if devices.strip() and (chosen.type, chosen.index or 0) != (there.type, there.index or 0):
        raise ValueError(
            f'devices is "{devices.strip()}", but one device gets no processes of its own, and ComfyUI computes on '
            f"{there}. Name at least two devices, or leave devices empty; ComfyUI's own device is set when it is "
            "started (--default-device)."
        )
    asked = {"ring_degree": config.ring_degree, "ulysses_degree": config.ulysses_degree}
    if above := [f"{name} is {degree}" for name, degree in asked.items() if degree > 1]:
        raise ValueError(f"{' and '.join(above)}, but there is one device; use 0, or name at least two devices.")
    if config.batch_parallel == "on":
        raise ValueError("batch_parallel is on, but there is one device; use auto, or name at least two devices.")


def chosen_devices(num_devices: int, devices: str, default: torch.device) -> tuple[str, ...]:
    """The devices of a user's request, one for each rank.

    num_devices: 0 takes all there are. devices: names or numbers between commas ("0, 1", "cuda:1", "cpu"), empty: the
    first ones of the kind of `default`, the device that the host samples on.
    Raises ValueError for a device that is not there, that is named twice, or for a number that they do not make.
    """
    named = [_device(name, default) for name in devices.replace(",", " ").split()]
    if default.type == "cpu" and not named:
        named = ["cpu"] * max(num_devices, 1)
    if named == ["cpu"] and num_devices > 1:
        named = ["cpu"] * num_devices
    there = torch.accelerator.device_count() if default.type != "cpu" else 0
    if not named:
        if num_devices > there:
            raise ValueError(f"num_devices is {num_devices}, but this machine has {there}; use 0 for all of them.")
        named = [f"{default.type}:{number}" for number in range(num_devices or there)]
    if num_devices not in (0, len(named)):
        raise ValueError(
            f"num_devices is {num_devices}, but devices names {len(named)}: {devices.strip()}. Make them agree."
        )
    for name in named:
        _check_there(name, named, there)
    return tuple(named)


def _check_there(name: str, named: list[str], there: int) -> None:
    device = torch.device(name)
    if device.type == "cpu":
        return
    if device.index >= there:
        allowed = f"{there}: 0 to {there - 1}" if there else "none that ComfyUI uses; leave devices empty, or name cpu"
        raise ValueError(f"device {name} is not there; this machine has {allowed}.")
    if named.count(name) > 1:
        raise ValueError(f"device {name} is named {named.count(name)} times; name each once.")


def _device(name: str, default: torch.device) -> str:
    try:
        found = torch.device(f"{default.type}:{name}" if name.isdigit() and default.type != "cpu" else name)
    except RuntimeError:
        raise ValueError(
            f'"{name}" is not a device; name them like 0, 1 or cuda:0, cuda:1, or leave this empty.'
        ) from None
    if found.type != "cpu" and found.index is None:
        return f"{found.type}:0"
    return found.type if found.type == "cpu" else str(found)
