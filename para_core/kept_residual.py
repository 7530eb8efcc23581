"""A residual that is remembered from one step to the next: where the model is, or in CPU memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Kind = tuple[torch.Size, torch.dtype, torch.device]


class KeptResidual:
    """residual: belongs to this object from now on. in_host: keep a copy in CPU memory and let the model's go."""

    def __init__(self, residual: Tensor, *, in_host: bool = False) -> None:
        self.kind = kind_of(residual)
        self.in_host = in_host
        self.held = to_host(residual) if in_host else residual

    def tensor(self) -> Tensor:
        """The residual where the model is, read-only; fetched for this call if it is held in CPU memory."""
        return to_device(self.held, self.kind[2]) if self.in_host else self.held


def kind_of(residual: Tensor) -> Kind:
    """What must be the same of two residuals that are to be compared."""
    return residual.shape, residual.dtype, residual.device


def to_host(residual: Tensor) -> Tensor:
    """A copy in CPU memory, pinned where the model is on CUDA; the tensor itself if it is there already."""
    if residual.device.type == "cpu":
        return residual
    pinned = residual.is_cuda
    held = torch.empty(residual.shape, dtype=residual.dtype, device="cpu", pin_memory=pinned)
    # Only read again by a copy on the same stream, so nobody has to wait for this one.
    return held.copy_(residual, non_blocking=pinned)


def to_device(held: Tensor, device: torch.device) -> Tensor:
    """The tensor on `device`."""
    return held if held.device == device else held.to(device, non_blocking=held.is_pinned())


def combined(weights: Sequence[float], residuals: Sequence[KeptResidual]) -> Tensor:
    """The weighted sum, in the residuals' dtype, added up in float32; the newest itself where only it counts.

    Of those held in CPU memory one at a time is fetched.
    """
    newest = residuals[0].tensor()
    if not any(weights[1:]) and weights[0] == 1:
        return newest
    total = newest.float() * weights[0]
    for weight, residual in zip(weights[1:], residuals[1:], strict=True):
        if weight:
            total.add_(residual.tensor(), alpha=weight)
    return total.to(newest.dtype)
