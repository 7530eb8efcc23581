"""Compiles each kind of block of a model once, and lets all blocks of the kind run the compiled code for a while."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from .artifact_cache import ArtifactCache
from .compile_config import CompileConfig, compile_obstacle
from .compile_report import Compiled, CompileReport
from .compile_watch import CompileWatch
from .compiled_kind import Kind, structure_of
from .families import ModelFamily

logger = logging.getLogger(__name__)

# A block and its arguments, to why this call runs as it is (or None) and what compiled code is given.
Entrance = Callable[[nn.Module, tuple, dict], "tuple[str | None, tuple, dict]"]


class Compilation:
    """What has been compiled for one model; it lasts as long as its owner keeps it, over any number of runs.

    cache: where artifacts are kept for the next process.
    """

    def __init__(self, config: CompileConfig, cache: ArtifactCache | None = None) -> None:
        self.config, self.cache = config, cache
        self.compiled: list[Compiled] = []
        self._kinds: dict[object, Kind] = {}

    def kind_of(self, name: str, block: nn.Module) -> Kind:
        key = (name, type(block), structure_of(block))
        if key not in self._kinds:
            self._kinds[key] = Kind(name, block, self.config)
        return self._kinds[key]

    @contextmanager
    def run(
        self,
        model: nn.Module,
        family: ModelFamily | None,
        *,
        entrance: Entrance | None = None,
        listener: Callable[[CompileReport], None] | None = None,
    ) -> Iterator[CompileRun]:
        """Within the context the model's blocks (scope model: the model itself) run compiled code.

        Only `forward` of the instances is set, and taken away again: parameter names, hooks and other modules of the
        classes stay. entrance: called before each block; it may raise to end the run. family: not needed with scope
        model.
        Raises ValueError where nothing can be compiled, unless the config allows to run uncompiled.
        """
        run = CompileRun(self, entrance, listener)
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        obstacle = compile_obstacle(self.config, device)
        if obstacle is not None:
            refuse(obstacle, self.config)
            run.uncompiled[obstacle] = 0
        blocks = [] if obstacle is not None else list(_targets(model, family, self.config))
        try:
            for name, block in blocks:
                if "forward" not in block.__dict__:
                    block.forward = run.forward_of(name, block)
                elif not isinstance(block.__dict__["forward"], CompiledForward):
                    run.note("another extension has replaced the block's forward")
            with run.watch.installed():
                yield run
        finally:
            for _, block in blocks:
                forward = block.__dict__.get("forward")
                if isinstance(forward, CompiledForward) and forward.run is run:
                    del block.forward
            run.end()


class CompiledForward:
    """Stands in for a block's forward in one run."""

    def __init__(self, run: CompileRun, name: str, block: nn.Module) -> None:
        self.run, self.name, self.block = run, name, block
        self.kind: Kind | None = None

    def __call__(self, *args, **kwargs):
        run, block = self.run, self.block
        reason, given = None, (args, kwargs)
        if run.entrance is not None:
            reason, *given = run.entrance(block, args, kwargs)
        if reason is None:
            # Not before: the host exchanges layers when it loads the model, inside the run.
            self.kind = self.kind or run.compilation.kind_of(self.name, block)
            reason = self.kind.obstacle
        if reason is not None:
            run.note(reason)
            return type(block).forward(block, *args, **kwargs)
        return run.call(self.kind, block, *given)


class CompileRun:
    """One run: its numbers, and how a block of it is called."""

    def __init__(
        self, compilation: Compilation, entrance: Entrance | None, listener: Callable[[CompileReport], None] | None
    ) -> None:
        self.compilation, self.entrance, self.listener = compilation, entrance, listener
        self.compiled: list[Compiled] = []
        self.uncompiled: dict[str, int] = {}
        self.num_blocks = 0
        self._names: set[tuple[str, type]] = set()
        self.watch = CompileWatch(self.tell)
        self._finished = False

    def forward_of(self, name: str, block: nn.Module) -> CompiledForward:
        self.num_blocks += 1
        self._names.add((name, type(block)))
        return CompiledForward(self, name, block)

    def note(self, reason: str) -> None:
        self.uncompiled[reason] = self.uncompiled.get(reason, 0) + 1

    def call(self, kind: Kind, block: nn.Module, args: tuple, kwargs: dict):
        """What the block returns, by compiled code; compiled now if it has to be."""
        args, kwargs = tuple(map(_plain, args)), {name: _plain(value) for name, value in kwargs.items()}
        code, reason = kind.code_for((*args, *kwargs.values()))
        cache = self.compilation.cache
        config = kind.config
        if config.reuses_outputs:
            torch.compiler.cudagraph_mark_step_begin()
        try:
            with cache.used() if cache is not None else nullcontext(), self.watch.call(kind.name):
                result = code(block, *args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            return self._failed(kind, error)(block, *args, **kwargs)
        finally:
            self._enter(kind, reason)
        return _cloned(result) if config.reuses_outputs else result

    def _failed(self, kind: Kind, error: Exception) -> Callable:
        """What to call instead of code that could not be compiled."""
        kind.forget()
        cache, begun = self.compilation.cache, self.watch.num_compiled > 1
        if cache is not None and not begun and cache.discard(f"compiling {kind.name} failed with it"):
            return lambda block, *args, **kwargs: self.call(kind, block, args, kwargs)
        first_line = next(iter(str(error).strip().splitlines()), "")
        obstacle = kind.obstacle = f"{kind.name} cannot be compiled: {type(error).__name__}: {first_line}"
        if begun:  # a part of the block has run, and may have written into its arguments
            raise ValueError(f"{obstacle}; run again, and the block runs uncompiled if that is allowed") from error
        advice = "turn fullgraph off" if kind.config.fullgraph else "choose another backend or mode"
        refuse(f"{obstacle}; {advice}", kind.config, error)
        self.note(obstacle)
        return kind.forward

    def _enter(self, kind: Kind, reason: str) -> None:
        for seconds, torch_reason in self.watch.taken():
            self.compiled.append(Compiled(kind.name, seconds, torch_reason or reason))
            self.compilation.compiled.append(self.compiled[-1])

    def report(self) -> CompileReport:
        compilation, since = self.compilation, self.watch.since
        return CompileReport(
            tuple(self.compiled),
            len(compilation.compiled),
            sum(one.seconds for one in compilation.compiled),
            self.num_blocks,
            len(self._names),
            dict(self.uncompiled),
            None if since is None else self.watch.name,
            0.0 if since is None else time.perf_counter() - since,
            None if compilation.cache is None else compilation.cache.num_bytes,
            self._finished,
        )

    def tell(self) -> None:
        if self.listener is not None:
            self.listener(self.report())

    def end(self) -> None:
        """Keep what was compiled for the next process, and tell the final numbers."""
        if self.compiled and self.compilation.cache is not None:
            self.compilation.cache.settle()
        self._finished = True
        logger.info(self.report().summary())
        self.tell()


def compiled_blocks(
    model: nn.Module, family: ModelFamily | None, config: CompileConfig, *, compilation: Compilation | None = None
) -> AbstractContextManager[CompileRun]:
    """Within the context the model's blocks run compiled code; for code that serves a model without a host.

    compilation: keeps the compiled code from one context to the next; without one it goes with the context.
    Raises ValueError as `Compilation.run` does.
    """
    return (compilation or Compilation(config)).run(model, family)


def refuse(obstacle: str, config: CompileConfig, cause: Exception | None = None) -> None:
    """Raise ValueError, or log the obstacle where the config allows to run uncompiled."""
    if not config.allow_uncompiled:
        raise ValueError(f"{obstacle}; or set allow_uncompiled to run it as it is") from cause
    logger.warning("%s; it runs uncompiled", obstacle)


def _targets(model: nn.Module, family: ModelFamily | None, config: CompileConfig) -> Iterator[tuple[str, nn.Module]]:
    """What is compiled, each with the name of its kind."""
    if config.scope == "model":
        yield type(model).__name__, model
        return
    assert family is not None, "scope blocks needs the model's family"
    for stack in (*family.stacks, *family.branches):
        for block in stack.blocks_in(model):
            yield type(block).__name__ if stack.layered else stack.blocks.removesuffix("s"), block


def _plain(value: object) -> object:
    """A tensor without what torch guards although it means nothing: the base of a view, strides of dims of size 1."""
    if not isinstance(value, Tensor):
        return value
    if value.is_inference():  # a view of it remembers no base, and what a block writes still arrives
        return value.view(-1).view(value.shape) if 1 in value.shape and value.is_contiguous() else value
    return value.clone(memory_format=torch.contiguous_format) if value._is_view() else value


def _cloned(result):
    if isinstance(result, Tensor):
        return result.clone()
    return type(result)(map(_cloned, result)) if isinstance(result, (tuple, list)) else result
