"""diffusers: contexts around every call of one pipeline object, each under a name of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import TypeVar

from diffusers import DiffusionPipeline

Pipe = TypeVar("Pipe", bound=DiffusionPipeline)
# The pipeline and the arguments of the call, by name and with their defaults, to what the call runs in.
Around = Callable[[DiffusionPipeline, dict], AbstractContextManager]


def around_calls(pipe: Pipe, name: str, around: Around) -> Pipe:
    """Let every later call of `pipe` run inside `around(pipe, arguments)`; replaces what stood under `name`.

    Other pipelines of the class are untouched. Contexts are entered in alphabetical order of their names, so that the
    order of the calls of this function plays no part.
    """
    base = getattr(type(pipe), "para_base", type(pipe))
    contexts = {**getattr(type(pipe), "para_contexts", {}), name: around}
    signature = inspect.signature(base.__call__)

    def call(self, *args, **kwargs):
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        with ExitStack() as stack:
            for key in sorted(contexts):
                stack.enter_context(contexts[key](self, given.arguments))
            return base.__call__(self, *args, **kwargs)

    # A class of its own for this one object: special methods are looked up on the class, not on the instance.
    members = {"__call__": call, "__module__": base.__module__, "para_base": base, "para_contexts": contexts}
    pipe.__class__ = type(base.__name__, (base,), members)
    return pipe
