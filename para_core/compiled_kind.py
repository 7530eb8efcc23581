"""The compiled code of all blocks of a model that are built alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from types import FunctionType

import torch
from torch import Tensor, nn

from .compile_config import CompileConfig

logger = logging.getLogger(__name__)

MAX_SIZES = 16  # of one kind of block with dynamic off; the longest unused one makes room


class Kind:
    """The compiled code of all blocks that are built alike.

    The class's own forward is compiled with the block as its first argument, so that torch tells blocks apart by
    structure and not by identity. It is compiled from copies of its code object: torch keeps what it compiles there,
    and so it goes when the kind goes, and no kind counts towards another one's recompile limit.
    """

    def __init__(self, name: str, block: nn.Module, config: CompileConfig) -> None:
        self.name, self.config = name, config
        self.forward = type(block).forward
        self.obstacle: str | None = None
        self._first: object = None
        self._by_size: dict[object, Callable] = {}

    def code_for(self, arguments: Sequence[object]) -> tuple[Callable, str]:
        """The compiled code for arguments of this size, and why it is not the first; it compiles when it is called."""
        size = _size(arguments)
        if self._first is None:
            self._first = size
        # A whole model makes position ids of its sizes, which torch takes for constants all the same.
        some = size != self._first and self.config.scope == "blocks"
        dynamic = {"auto": some, "on": True, "off": False}[self.config.dynamic]
        key = "any" if dynamic else size
        found = self._by_size.pop(key, None)
        if found is None and len(self._by_size) >= MAX_SIZES:
            del self._by_size[next(iter(self._by_size))]
            logger.info("%s is compiled for %d sizes; the longest unused one is dropped", self.name, MAX_SIZES)
        reason = "another size" if found is None and self._by_size else ""
        self._by_size[key] = found or self._compiled(dynamic)
        return self._by_size[key], reason

    def forget(self) -> None:
        """Compile anew at the next call."""
        self._by_size.clear()
        self._first = None

    def _compiled(self, dynamic: bool) -> Callable:
        config = self.config
        mode = {"mode": config.mode} if config.backend == "inductor" else {}
        return torch.compile(
            _copy(self.forward), backend=config.backend, fullgraph=config.fullgraph, dynamic=dynamic, **mode
        )


def structure_of(block: nn.Module) -> tuple:
    """What blocks of one kind have in common: the types inside, and their parameters' shapes and dtypes."""
    return tuple(
        (name, type(module), *((key, p.shape, p.dtype) for key, p in module.named_parameters(recurse=False)))
        for name, module in block.named_modules()
    )


def _copy(function: Callable) -> Callable:
    """The same function with a code object of its own."""
    if not isinstance(function, FunctionType):  # decorated by an object
        return _copy(lambda block, *args, **kwargs: function(block, *args, **kwargs))
    code = function.__code__.replace()
    copy = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _size(value: object) -> object:
    """The shapes of all tensors in arguments, those inside tuples and plain objects included."""
    if isinstance(value, Tensor):
        return value.shape
    if isinstance(value, (tuple, list)):
        return tuple(map(_size, value))
    # Not a host's options, which are dicts.
    return tuple(map(_size, vars(value).values())) if hasattr(value, "__dict__") and not callable(value) else None
