"""Attention over the tokens of all ranks as one operator, so that a block around it compiles in one piece."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .sharded_call import ShardedCall

# Operators take no Python objects, so this one looks up here which model call it is part of; set for that call only.
_CALL: ContextVar[ShardedCall] = ContextVar("sharded_call")
# Of this module's own: the pack may be loaded twice, under two names.
NAMESPACE = __name__.replace(".", "_").replace("-", "_")


@contextmanager
def attending(sharded: ShardedCall) -> Iterator[None]:
    """Within the context `attention` is that of `sharded`."""
    token = _CALL.set(sharded)
    try:
        yield
    finally:
        _CALL.reset(token)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, enable_gqa: bool = False
) -> Tensor:
    """Of this rank's queries to the keys on all ranks, or to these where the attention is this rank's own affair.

    q, k, v: (B, H, S, D), with fewer heads in k and v where enable_gqa is set. Like every operator it may be compiled,
    and the exchange between the ranks stays inside.
    """
    sharded = _CALL.get()
    over = sharded.next_attention()
    if over is None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    else:
        out = sharded.attention(over, q, k, v, mask=mask, scale=scale, enable_gqa=enable_gqa)
    return out.contiguous()


@attention.register_fake
def _(q, k, v, mask=None, scale=None, enable_gqa=False):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
