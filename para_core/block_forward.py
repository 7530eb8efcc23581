"""The generic way into a block where the host offers no hook: its `forward` is swapped for one model call."""

from __future__ import annotations

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
                block.forward = _forward(call, number, index, stack, block.forward)
        yield
    finally:
        for block, forward in found:
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _forward(call: CachedCall, number: int, index: int, stack: BlockStack, original: Callable) -> Callable:
    names = list(inspect.signature(original).parameters)
    positions = {stream.argument: names.index(stream.argument) for stream in stack.streams if stream.argument in names}

    def forward(*args: Tensor, **kwargs: Tensor):
        arguments = {
            name: kwargs[name] if name in kwargs else args[position]
            for name, position in positions.items()
            if name in kwargs or position < len(args)
        }
        return call.block(number, index, arguments, lambda: original(*args, **kwargs))

    return forward
