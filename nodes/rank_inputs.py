"""The inputs by which a node says on which devices it works; the same on every node that runs on several."""

import comfy.model_management
from comfy_api.latest import io

from ..para_core.parallel_config import BACKENDS, chosen_devices


def num_devices(tooltip: str) -> io.Int.Input:
    """How many; tooltip: what they do together."""
    return io.Int.Input("num_devices", default=0, min=0, max=64, tooltip=tooltip)


def devices() -> io.String.Input:
    """Which ones."""
    return io.String.Input(
        "devices",
        default="",
        tooltip="Which ones, for example 0, 1 or cuda:2, cuda:3. cpu runs the processes on the CPU, for tests. "
        "Empty: the first ones.",
    )


def backend() -> io.Combo.Input:
    """How they exchange tensors."""
    return io.Combo.Input(
        "backend",
        options=list(BACKENDS),
        default="auto",
        tooltip="How the processes talk: nccl between GPUs, gloo between CPUs. auto: by device.",
    )


def attach_to() -> io.String.Input:
    """Whose they are."""
    return io.String.Input(
        "attach_to",
        default="",
        tooltip="Address (a socket file) of a group that you started yourself with torchrun, for example on several "
        "machines; then the devices are its own. Empty: the node starts one here.",
    )


def requested_devices(number: int, names: str, address: str) -> tuple[str, ...]:
    """One for each rank; none where they are those of a group at an address.

    Raises ValueError for devices beside an address, and see chosen_devices.
    """
    if not address:
        return chosen_devices(number, names, comfy.model_management.get_torch_device())
    if number or names.strip():
        raise ValueError(
            f"the group at {address} has devices of its own; leave num_devices at 0 and devices empty, or attach_to "
            "empty."
        )
    return ()
