"""The generic way into a block where the host offers no hook: its `forward` is swapped for one model call."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .families import BlockStack, ModelFamily
from .first_block import CachedCall


@contextmanager
def swapped_forwards(model: nn.Module, family: ModelFamily, call: CachedCall) -> Iterator[None]:
    """Within the context, `call` stands in for the forward of every block of the family's hook-less stacks.

    Only instance attributes are set, and each block is put back as it was found: parameter names, state dict keys and
    other modules of the class stay as they are, and a forward that an offloading library put there is called inside.
    """
    found: list[tuple[nn.Module, Callable | None]] = []
    try:
        for number, stack in enumerate(family.stacks):
            for index, block in enumerate(getattr(model, stack.blocks) if stack.hook is None else ()):
                found.append((block, block.__dict__.get("forward")))
                block.forward = _forward(call, number, index, _positions(stack, type(block)), block.forward)
        yield
    finally:
        for block, forward in found:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


@functools.cache
def _positions(stack: BlockStack, block_class: type[nn.Module]) -> dict[str, int]:
    # Of the class: an offloading library's wrapper on the instance only says *args, **kwargs.
    parameters = list(inspect.signature(block_class.forward).parameters)[1:]
    return {stream.argument: parameters.index(stream.argument) for stream in stack.streams}


def _forward(call: CachedCall, number: int, index: int, positions: dict[str, int], original: Callable) -> Callable:
    def forward(*args: Tensor, **kwargs: Tensor):
        arguments = {
            name: kwargs[name] if name in kwargs else args[position] for name, position in positions.items()
        }
        return call.block(number, index, arguments, lambda: original(*args, **kwargs))

    return forward
