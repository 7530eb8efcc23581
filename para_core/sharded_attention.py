"""Attention over the tokens of all ranks as one operator, so that a block around it compiles in one piece."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .sharded_call import ShardedCall

# (q, k, v, mask or None, scale=, enable_gqa=) -> out: attention of one device over the keys that it is given
OwnAttention = Callable[..., Tensor]

# Operators take no Python objects, so this one looks up here which model call it is part of; set for that call only.
_CALL: ContextVar[tuple[ShardedCall, OwnAttention | None]] = ContextVar("sharded_call")
# Of this module's own: the pack may be loaded twice, under two names.
NAMESPACE = __name__.replace(".", "_").replace("-", "_")


@contextmanager
def attending(sharded: ShardedCall, own: OwnAttention | None = None) -> Iterator[None]:
    """Within the context `attention` is that of `sharded`. own: the host's, which runs where no ring needs another."""
    token = _CALL.set((sharded, own))
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
    sharded, own = _CALL.get()
    options = {"scale": scale, "enable_gqa": enable_gqa}
    own = None if own is None else functools.partial(own, **options)
    over = sharded.next_attention()
    if over is not None:
        out = sharded.attention(over, q, k, v, mask=mask, own=own, **options)
    elif own is not None:
        out = own(q, k, v, mask)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)
    return out.contiguous()


@attention.register_fake
def _(q, k, v, mask=None, scale=None, enable_gqa=False):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))
