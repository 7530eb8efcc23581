"""What a rank does together with the others as operators, so that a block around them compiles in one piece."""

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

# Operators take no Python objects, so these look up here which model call they are part of; set for that call only.
_CALL: ContextVar[tuple[ShardedCall, OwnAttention | None]] = ContextVar("sharded_call")
# Of this module's own: the pack may be loaded twice, under two names.
NAMESPACE = __name__.replace(".", "_").replace("-", "_")

# All operators declare that they write to this tensor, so that each stays behind the one before it. Inductor moves
# independent ones to where it expects the least memory in use, which depends on how many tokens a rank has; then two
# ranks would wait for each other in different exchanges. Ordered effects would say it too, but are not kept in
# torch's caches (2.14). Nothing is in it.
with torch.inference_mode(False):
    _TURN = torch.zeros(1, device="cpu")


@contextmanager
def operators_of(sharded: ShardedCall, own: OwnAttention | None = None) -> Iterator[None]:
    """Within the context the operators are part of `sharded`. own: the host's attention, where no ring needs another.

    All ranks must call them in the same order.
    """
    token = _CALL.set((sharded, own))
    try:
        yield
    finally:
        _CALL.reset(token)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None, enable_gqa: bool = False
) -> Tensor:
    """Of this rank's queries to the keys on all ranks, or to these where the attention is this rank's own affair.

    q, k, v: (B, H, S, D), with fewer heads in k and v where enable_gqa is set. Like every operator it may be compiled,
    and the exchange between the ranks stays inside.
    """
    return _attention(q, k, v, mask, scale, enable_gqa, _TURN)


def largest_magnitude(x: Tensor) -> Tensor:
    """Of x on all ranks of the mesh, () float32; a rank's x may be without elements, all others must match in dtype."""
    own = x.abs().amax() if x.numel() else x.new_zeros(())
    return _max_over_ranks(own.float(), _TURN)


@torch.library.custom_op(f"{NAMESPACE}::attention", mutates_args=("turn",))
def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, enable_gqa: bool, turn: Tensor
) -> Tensor:
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


@_attention.register_fake
def _(q, k, v, mask, scale, enable_gqa, turn):
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


@torch.library.custom_op(f"{NAMESPACE}::max_over_ranks", mutates_args=("turn",))
def _max_over_ranks(values: Tensor, turn: Tensor) -> Tensor:
    sharded, _ = _CALL.get()
    return sharded.max(values.clone())


@_max_over_ranks.register_fake
def _(values, turn):
    return torch.empty_like(values)
