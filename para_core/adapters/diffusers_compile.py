"""diffusers: torch.compile on a pipeline's transformer, each kind of block once, for the duration of a call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..artifact_cache import ArtifactCache
from ..compilation import Compilation
from ..compile_config import CompileConfig
from ..compile_report import CompileReport
from ..families import family_of
from .diffusers_calls import Pipe, around_calls


def compile_pipe(
    pipe: Pipe,
    *,
    scope: str = "blocks",
    mode: str = "default",
    dynamic: str = "auto",
    fullgraph: bool = False,
    backend: str = "inductor",
    allow_uncompiled: bool = False,
    cache_directory: str | Path | None = None,
    listener: Callable[[CompileReport], None] | None = None,
) -> Pipe:
    """Make every later call of this pipeline object run compiled blocks, and return it.

    The settings are those of `CompileConfig`. Applying again replaces them, and compiles anew; other pipelines are
    untouched. Goes together with `apply_cache_on_pipe`, in any order. Nothing is compiled before the first call.
    cache_directory: where artifacts are kept for the next process. listener: called while something is compiled and
    when a call has ended. Raises ValueError for a pipeline without a transformer, for one whose transformer no family
    serves, and at the call where nothing can be compiled.
    """
    config = CompileConfig(scope, mode, dynamic, fullgraph, backend, allow_uncompiled)
    if getattr(pipe, "transformer", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no transformer; compiling is for diffusion transformers.")
    family = family_of(pipe.transformer) if scope == "blocks" else None
    device = next((parameter.device for parameter in pipe.transformer.parameters()), torch.device("cpu"))
    cache = None if cache_directory is None else ArtifactCache(Path(cache_directory), device)
    compilation = Compilation(config, cache)
    # In front of the cache's name in the alphabet: that one finds compiled blocks, and decides between them.
    return around_calls(pipe, "compile", lambda pipe, _: compilation.run(pipe.transformer, family, listener=listener))
