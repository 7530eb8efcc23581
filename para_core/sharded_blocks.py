"""The blocks of a model under a sharded call: each `forward` is exchanged for the duration of one model call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import nn

from .block_forward import exchanged_forwards
from .families import ModelFamily
from .sharded_call import ShardedCall
from .streams import Result
from .token_splits import Arguments

Compute = Callable[[Arguments], Result]


class AroundBlocks(Protocol):
    """What stands around every block, inside the sharding; `CachedCall.block` of `family.through_forward()` does."""

    def __call__(self, stack: int, index: int, arguments: Arguments, compute: Callable[[], Result]) -> Result: ...


def as_they_are(stack: int, index: int, arguments: Arguments, compute: Callable[[], Result]) -> Result:
    return compute()


@contextmanager
def sharded_blocks(
    model: nn.Module, family: ModelFamily, sharded: ShardedCall, around: AroundBlocks = as_they_are
) -> Iterator[None]:
    """Within the context `sharded` stands in for every block. family: `through_forward()`."""
    exchanges = [
        (block, _forward(block, functools.partial(_run_block, sharded, around, number, index)))
        for number, stack in enumerate(family.stacks)
        for index, block in enumerate(stack.blocks_in(model))
    ]
    for stack in family.branches:
        run = functools.partial(sharded.branch, stack)
        exchanges += [(block, _forward(block, run)) for block in stack.blocks_in(model)]
    with exchanged_forwards(exchanges):
        yield
    assert sharded.finished, f"{type(model).__name__} has not called the `forward` of its last block"


@functools.cache
def _positional_names(block_class: type[nn.Module]) -> tuple[str, ...]:
    # Of the class: an offloading library's wrapper on the instance only says *args, **kwargs.
    parameters = list(inspect.signature(block_class.forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


def _run_block(
    sharded: ShardedCall, around: AroundBlocks, stack: int, index: int, arguments: Arguments, compute: Compute
) -> Result:
    def run(local: Arguments) -> Result:
        return around(stack, index, local, lambda: sharded.computed(compute(local)))

    return sharded.block(stack, index, arguments, run)


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
