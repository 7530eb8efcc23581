"""ComfyUI on a rank: a diffusion model's forward whose blocks only see this rank's tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..families import ModelFamily
from ..sharded_blocks import AroundBlocks, as_they_are, sharded_blocks
from ..sharded_call import ShardedCall, refuse_unsharded
from ..token_splits import SequenceRanks


def sharded_forward(
    model: nn.Module,
    family: ModelFamily,
    ranks: SequenceRanks,
    call: tuple[tuple, Mapping[str, object]],
    *,
    around_blocks: AroundBlocks = as_they_are,
) -> Tensor:
    """The diffusion model's output, the same on every rank and as on a single one.

    call: the positional and the keyword arguments, the same on every rank; `control` and `transformer_options` are
    keywords, as the host gives them. Raises ValueError for a model that cannot be sharded.
    """
    refuse_unsharded(model, family)
    args, kwargs = call
    family = family.through_forward()
    num_blocks = [len(stack.blocks_in(model)) for stack in family.stacks]
    # Lists of our own: they are cut to this rank's tokens.
    control = {name: list(found) for name, found in (kwargs.get("control") or {}).items()}
    sharded = ShardedCall(family, num_blocks, ranks, control)
    options = dict(kwargs.get("transformer_options") or {})
    options["optimized_attention_override"] = _attention_of(sharded, options.get("optimized_attention_override"))
    changed = {"transformer_options": options, **({"control": control} if control else {})}
    with sharded_blocks(model, family, sharded, around_blocks):
        return model(*args, **{**kwargs, **changed})


def _attention_of(sharded: ShardedCall, inner: Callable | None) -> Callable:
    """The host's way to exchange an attention call: those over sharded tokens go to all ranks, others stay."""

    def override(
        func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False, **kwargs
    ):
        over = sharded.next_attention()
        if over is None:
            own = functools.partial(inner, func) if inner else func
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
        out = sharded.attention(over, q, k, v, mask=mask, **options)
        return out if skip_output_reshape else out.transpose(1, 2).flatten(2)

    return override
