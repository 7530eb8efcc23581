"""What the ranks of test_parallel_vae.py run."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from para_core.parallel_vae import CannotSplit, parallel_decode

from .layers import EXACT, build, latent


def errors(rank: int, world_size: int, *, dim: int, inference: bool) -> dict[str, tuple[float, bool]]:
    """Of each small decoder the relative error against one process, and whether the shapes are the same."""
    with torch.inference_mode(inference), torch.no_grad():
        return {name: _error(build(make).eval(), dim) for name, make in EXACT.items()}


def _error(decoder: torch.nn.Module, dim: int) -> tuple[float, bool]:
    z = latent() if dim == -2 else latent().transpose(-1, -2).contiguous()
    expected, found = tree_leaves(decoder(z)), tree_leaves(parallel_decode(decoder, z, dim=dim))
    pairs = [(a, b) for a, b in zip(expected, found, strict=True) if isinstance(a, torch.Tensor)]
    same = all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(float((a - b).norm() / a.norm()) for a, b in pairs) if same else float("inf"), same


def calls(rank: int, world_size: int, *, rows: int, compiled: bool = False, destination: int | None = None):
    """(shape of the result, relative error, numbers of rows that the decoder saw)."""
    decoder, seen = build(EXACT["group norm"]), []
    if compiled:
        decoder = torch.compile(decoder, backend="eager")

    def decode(z):
        seen.append(z.shape[2])
        return decoder(z)

    z = latent(rows=rows)
    found, expected = parallel_decode(decode, z, dim=-2, destination=destination), decoder(z)
    error = float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else None
    return tuple(found.shape), error, seen


def in_subgroups(rank: int, world_size: int) -> float:
    """Two groups of two decode pictures of their own at the same time; rank 0 of the second is no global rank 0."""
    groups = [dist.new_group([first, first + 1]) for first in range(0, world_size, 2)]
    decoder, z = build(EXACT["group norm"]), latent() + rank // 2
    return float((parallel_decode(decoder, z, group=groups[rank // 2], dim=-2) - decoder(z)).abs().max())


def refused_then_decoded(rank: int, world_size: int) -> tuple[str, float]:
    """A refusal leaves the group and the decoder as they were."""
    decoder, z = build(EXACT["convolution"]), latent()
    try:
        parallel_decode(lambda z: decoder(z).flip(2), z, dim=-2)
        text = ""
    except CannotSplit as error:
        text = str(error)
    return text, float((parallel_decode(decoder, z, dim=-2) - decoder(z)).abs().max())
