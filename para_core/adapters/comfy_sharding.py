"""ComfyUI on a rank: a diffusion model's forward whose blocks only see this rank's tokens."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Protocol

from torch import Tensor, nn

from ..block_forward import exchanged_forwards
from ..families import ModelFamily
from ..sharded_call import ShardedCall, sharding_obstacle
from ..streams import Result
from ..token_splits import Arguments, SequenceRanks

Compute = Callable[[Arguments], Result]


class AroundBlocks(Protocol):
    """What stands around every block, inside the sharding; `CachedCall.block` of `family.through_forward()` does."""

    def __call__(self, stack: int, index: int, arguments: Arguments, compute: Callable[[], Result]) -> Result: ...


def _as_it_is(stack: int, index: int, arguments: Arguments, compute: Callable[[], Result]) -> Result:
    return compute()


def sharded_forward(
    model: nn.Module,
    family: ModelFamily,
    ranks: SequenceRanks,
    call: tuple[tuple, Mapping[str, object]],
    *,
    around_blocks: AroundBlocks = _as_it_is,
) -> Tensor:
    """The diffusion model's output, the same on every rank and as on a single one.

    call: the positional and the keyword arguments, the same on every rank; `control` and `transformer_options` are
    keywords, as the host gives them. Raises ValueError for a model that cannot be sharded.
    """
    obstacle = sharding_obstacle(model, family)
    if obstacle is not None:
        raise ValueError(
            f"{type(model).__name__} cannot run on several devices: {obstacle}. Remove the Context-Parallel Launcher."
        )
    args, kwargs = call
    family = family.through_forward()
    num_blocks = [len(stack.blocks_in(model)) for stack in family.stacks]
    # Lists of our own: they are cut to this rank's tokens.
    control = {name: list(found) for name, found in (kwargs.get("control") or {}).items()}
    sharded = ShardedCall(family, num_blocks, ranks, control)
    options = dict(kwargs.get("transformer_options") or {})
    options["optimized_attention_override"] = _attention_of(sharded, options.get("optimized_attention_override"))
    changed = {"transformer_options": options, **({"control": control} if control else {})}
    exchanges = [
        (block, _forward(block, functools.partial(_run_block, sharded, around_blocks, number, index)))
        for number, stack in enumerate(family.stacks)
        for index, block in enumerate(stack.blocks_in(model))
    ]
    for stack in family.branches:
        run = functools.partial(sharded.branch, stack)
        exchanges += [(block, _forward(block, run)) for block in stack.blocks_in(model)]
    with exchanged_forwards(exchanges):
        output = model(*args, **{**kwargs, **changed})
    assert sharded.finished, f"{type(model).__name__} has not called the `forward` of its last block"
    return output


@functools.cache
def _positional_names(block_class: type[nn.Module]) -> tuple[str, ...]:
    # Of the class: an offloading library's wrapper on the instance only says *args, **kwargs.
    parameters = list(inspect.signature(block_class.forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


def _run_block(
    sharded: ShardedCall, around: AroundBlocks, stack: int, index: int, arguments: Arguments, compute: Compute
) -> Result:
    return sharded.block(stack, index, arguments, lambda local: around(stack, index, local, lambda: compute(local)))


def _forward(block: nn.Module, run: Callable[[Arguments, Compute], Result]) -> Callable:
    """A `forward` for the block that gives its arguments, by name, and itself to `run`."""
    names, original = _positional_names(type(block)), block.forward

    def forward(*args, **kwargs):
        # By position where the block's signature has no names.
        positional = [names[at] if at < len(names) else at for at in range(len(args))]

        def compute(arguments: Arguments) -> Result:
            given = [arguments[key] for key in positional]
            return original(*given, **{key: arguments[key] for key in kwargs})

        return run({**dict(zip(positional, args, strict=True)), **kwargs}, compute)

    return forward


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
