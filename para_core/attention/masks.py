"""Attention masks, broadcastable to (B, H, Q, K): the part that one rank needs, and the rows that see no key."""

from __future__ import annotations

import torch
from torch import Tensor


def part_of(
    mask: Tensor, *, heads: slice = slice(None), rows: slice = slice(None), keys: slice = slice(None)
) -> Tensor:
    """A view of the mask's heads, query rows and keys; dims of size 1 stay as they are."""
    mask = mask[(None,) * (4 - mask.dim())]
    cuts = (slice(None), heads, rows, keys)
    return mask[tuple(slice(None) if size == 1 else cut for size, cut in zip(mask.shape, cuts, strict=True))]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask as a bias of the scores: bool (True: attend) becomes 0 and -inf."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def blind_rows(bias: Tensor) -> Tensor:
    """Where a query sees none of the keys of an additive mask: bool, broadcastable to (B, H, Q)."""
    return (bias == -torch.inf).all(-1)
