"""The generic way into a block where the host offers no hook: its `forward` is swapped for one model call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .families import BlockStack, ModelFamily
from .first_block import CachedCall


@contextmanager
def swapped_forwards(model: nn.Module, family: ModelFamily, call: CachedCall) -> Iterator[None]:
    """Within the context, `call` stands in for every block of the family's hook-less stacks, and of its branches.

    Only instance attributes are set, and each block is put back as it was found: parameter names, state dict keys and
    other modules of the class stay as they are, and a forward that an offloading library put there is called inside.
    """
    exchanges: list[tuple[nn.Module, Callable]] = []
    for number, stack in enumerate(family.stacks):
        for index, block in enumerate(stack.blocks_in(model) if stack.hook is None else ()):
            exchanges.append((block, _forward(call, (number, index), stack, block)))
    for stack in family.branches:
        exchanges += [(block, _branch_forward(call, stack, block)) for block in stack.blocks_in(model)]
    with exchanged_forwards(exchanges):
        yield


@contextmanager
def exchanged_forwards(exchanges: Iterable[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Within the context each block has another `forward`; afterwards the one that it was found with."""
    found: list[tuple[nn.Module, Callable | None]] = []
    try:
        for block, forward in exchanges:
            found.append((block, block.__dict__.get("forward")))
            block.forward = forward
        yield
    finally:
        for block, forward in found:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@functools.cache
def _positions(block_class: type[nn.Module], names: tuple[str | int, ...]) -> tuple[tuple[str | int, int], ...]:
    """Each argument and its position in a call without keywords."""
    # Of the class: an offloading library's wrapper on the instance only says *args, **kwargs.
    parameters = list(inspect.signature(block_class.forward).parameters)[1:]
    return tuple((name, name if isinstance(name, int) else parameters.index(name)) for name in names)


def _forward(call: CachedCall, position: tuple[int, int], stack: BlockStack, block: nn.Module) -> Callable:
    places, original, reshapes = _places(stack, block), block.forward, stack.reshapes

    def forward(*args: Tensor, **kwargs: Tensor):
        arguments = {name: kwargs[name] if name in kwargs else args[at] for name, at in places}
        shapes = (*_shapes(args), *kwargs, *_shapes(kwargs.values())) if reshapes else None
        return call.block(*position, arguments, lambda: original(*args, **kwargs), shapes=shapes)

    return forward


def _branch_forward(call: CachedCall, stack: BlockStack, block: nn.Module) -> Callable:
    places, original = _places(stack, block), block.forward

    def forward(*args: Tensor, **kwargs: Tensor):
        values = [kwargs[name] if name in kwargs else args[at] for name, at in places]
        return call.branch(dict(zip(stack.streams, values, strict=True)), lambda: original(*args, **kwargs))

    return forward


def _places(stack: BlockStack, block: nn.Module) -> tuple[tuple[str | int, int], ...]:
    return _positions(type(block), tuple(stream.argument for stream in stack.streams))


def _shapes(values: Iterable[object]) -> tuple[Hashable, ...]:
    """What decides the shape of a block's result: tensors' shapes, and sizes that are given as such."""
    # Not the host's options, which are dicts.
    hashable = (value for value in values if isinstance(value, Hashable))
    return tuple(value.shape if isinstance(value, Tensor) else value for value in hashable)
