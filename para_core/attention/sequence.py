"""A sequence divided among ranks: how many tokens each one has, and all of them gathered again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .mesh import Axis


def balanced_lengths(num_tokens: int, num_ranks: int) -> tuple[int, ...]:
    """Tokens of each rank, in rank order: they differ by at most one, and may be 0."""
    return tuple(num_tokens // num_ranks + (rank < num_tokens % num_ranks) for rank in range(num_ranks))


def slice_of(lengths: Sequence[int], rank: int) -> slice:
    """The place of a rank's tokens in the whole sequence."""
    start = sum(lengths[:rank])
    return slice(start, start + lengths[rank])


@torch.compiler.disable
def all_gather_sequence(x: Tensor, *, axis: Axis, lengths: Sequence[int], dim: int = 1) -> Tensor:
    """The whole sequence on every rank of the axis; x has this rank's tokens along dim. One collective."""
    if axis.size == 1:
        return x
    rows = x.movedim(dim, 0).contiguous()
    padding = max(lengths) - rows.shape[0]
    if padding:  # gloo gathers equal sizes only
        rows = torch.cat([rows, rows.new_zeros(padding, *rows.shape[1:])])
    gathered = rows.new_empty(axis.size, *rows.shape)
    dist.all_gather_into_tensor(gathered.flatten(0, 1), rows, group=axis.group)
    if len(set(lengths)) == 1:
        return gathered.flatten(0, 1).movedim(0, dim)
    parts = [part[:length] for part, length in zip(gathered, lengths, strict=True)]
    return torch.cat(parts).movedim(0, dim)
