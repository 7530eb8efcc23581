"""ComfyUI on a rank: a diffusion model's forward whose blocks only see this rank's tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..families import ModelFamily
from ..sharded_blocks import AroundBlocks, as_they_are, sharded_blocks
from ..sharded_call import ShardedCall, refuse_unsharded
from ..sharded_operators import attention, operators_of
from ..token_splits import SequenceRanks
from .comfy_attention import host_attention


def sharded_forward(
    model: nn.Module,
    family: ModelFamily,
    ranks: SequenceRanks,
    call: tuple[tuple, Mapping[str, object]],
    *,
    around_blocks: AroundBlocks = as_they_are,
    attention_on_ranks: AttentionOnRanks | None = None,
) -> Tensor:
    """The diffusion model's output, the same on every rank and as on a single one.

    call: the positional and the keyword arguments, the same on every rank; `control` and `transformer_options` are
    keywords, as the host gives them. attention_on_ranks: to be given where the blocks are compiled, the same each time.
    Raises ValueError for a model that cannot be sharded.
    """
    refuse_unsharded(model, family)
    args, kwargs = call
    family = family.through_forward()
    num_blocks = [len(stack.blocks_in(model)) for stack in family.stacks]
    # Lists of our own: they are cut to this rank's tokens.
    control = {name: list(found) for name, found in (kwargs.get("control") or {}).items()}
    sharded = ShardedCall(family, num_blocks, ranks, control)
    options = dict(kwargs.get("transformer_options") or {})
    inner = options.get("optimized_attention_override")
    override = options["optimized_attention_override"] = attention_on_ranks or AttentionOnRanks()
    changed = {"transformer_options": options, **({"control": control} if control else {})}
    with override.of(sharded, inner), sharded_blocks(model, family, sharded, around_blocks):
        return model(*args, **{**kwargs, **changed})


class AttentionOnRanks:
    """The host's way to exchange an attention call: those over sharded tokens go to all ranks, others stay.

    The same object for every call of a run and the runs after it, since compiled code remembers which it has seen.
    """

    def __init__(self) -> None:
        self._sharded: ShardedCall | None = None
        self._inner: Callable | None = None

    @contextmanager
    def of(self, sharded: ShardedCall, inner: Callable | None) -> Iterator[None]:
        """Within the context it serves this model call. inner: what has exchanged the host's attention before."""
        self._sharded, self._inner = sharded, inner
        try:
            with operators_of(sharded, host_attention):
                yield
        finally:
            self._sharded = self._inner = None

    def __call__(
        self,
        func,
        q,
        k,
        v,
        heads,
        mask=None,
        attn_precision=None,
        skip_reshape=False,
        skip_output_reshape=False,
        **kwargs,
    ):
        compiling, over = torch.compiler.is_compiling(), None
        if not compiling:
            over = self._sharded.next_attention()
            if over is None:
                own = functools.partial(self._inner, func) if self._inner else func
                return own(q, k, v, heads, mask, attn_precision, skip_reshape, skip_output_reshape, **kwargs)
        if not skip_reshape:
            # Some of the host's models give one of the three with its heads apart already.
            q, k, v = (tensor.flatten(2) for tensor in (q, k, v))
            dim = q.shape[-1] // heads
            q, k, v = (tensor.unflatten(-1, (-1, dim)).transpose(1, 2) for tensor in (q, k, v))
        if mask is not None:
            mask = mask[None] if mask.ndim == 2 else mask
            mask = mask[:, None] if mask.ndim == 3 else mask
        options = {name: kwargs[name] for name in ("scale", "enable_gqa") if name in kwargs}
        if compiling:
            out = attention(q, k, v, mask, **options)
        else:
            given = {"attn_precision": attn_precision, "skip_reshape": True, "skip_output_reshape": True, **kwargs}

            def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                return func(q, k, v, q.shape[1], mask=mask, **given)

            out = self._sharded.attention(over, q, k, v, mask=mask, own=own, **options)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)
