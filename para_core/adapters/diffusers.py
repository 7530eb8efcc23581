"""diffusers: the first-block cache on a transformer or a pipeline, through the library's own model hooks."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks import HookRegistry, ModelHook
from diffusers.hooks.hooks import StateManager

from ..between_blocks import loudness
from ..block_forward import swapped_forwards
from ..budget import Budget
from ..cache_report import RunReport
from ..cache_run import CacheRun
from ..families import family_of
from ..quantization_scheme import rounding_of
from ..residual_cache import CacheConfig, alone
from ..run_state import Step
from .diffusers_calls import Pipe, around_calls
from .diffusers_parallel import HOOK as PARALLEL_HOOK

logger = logging.getLogger(__name__)

HOOK = "para_accelerate_fbcache"


class ContextName(StateManager):
    """The name of the `cache_context` that the pipeline is in; the library tells it to a hook's state managers."""

    NAMES = {"cond": "positive", "uncond": "negative", None: "positive"}

    def __init__(self) -> None:
        super().__init__(None)
        self.name = "positive"

    def set_context(self, context: object) -> None:
        name = getattr(context, "name", context)  # diffusers 0.39 gives the name, 0.42 an object that has it
        self.name = self.NAMES.get(name, name)


class FBCacheHook(ModelHook):
    """Puts the cache around each forward of one denoising run, a state for each `cache_context` of the pipeline."""

    _is_stateful = True  # so that the library tells it the context

    def __init__(self, transformer: ModelMixin, run: CacheRun, num_steps: int) -> None:
        super().__init__()
        self.run = run
        self.num_steps = num_steps
        self.family = family_of(transformer)
        self._names = list(inspect.signature(transformer.forward).parameters)
        self.context = ContextName()
        self._sigmas: list[float] = []

    def new_forward(self, module: ModelMixin, *args, **kwargs):
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs}
        num_blocks = [len(stack.blocks_in(module)) for stack in self.family.stacks]
        conditionings, step = {self.context.name: self.context.name}, self._step(arguments["timestep"])
        if self.run.off:
            with self.run.counted(num_blocks, conditionings, step):
                return self.fn_ref.original_forward(*args, **kwargs)
        # As the library's models call what a ControlNet adds between their blocks.
        added = [value for name, value in arguments.items() if "controlnet" in name]
        step = replace(step, controlled=loudness(added))
        with (
            self.run.call(self.family, num_blocks, conditionings, step) as call,
            swapped_forwards(module, self.family, call),
        ):
            return self.fn_ref.original_forward(*args, **kwargs)

    def _step(self, timestep) -> Step:
        sigma = float(timestep.flatten()[0])  # pipelines of flow models pass the timestep as a fraction, 1 = pure noise
        if not self._sigmas or self._sigmas[-1] != sigma:
            self._sigmas.append(sigma)
        config = self.run.config
        return Step(
            len(self._sigmas) - 1,
            sigma,
            allowed=config.start_percent <= 1 - sigma <= config.end_percent,
            # The next timestep is the scheduler's secret; steps change slowly in width.
            width=abs(self._sigmas[-2] - sigma) if len(self._sigmas) > 1 else 0.0,
            num_steps=self.num_steps,
        )

    def reset_state(self, module: ModelMixin) -> ModelMixin:
        return module


@contextmanager
def cache_run(
    transformer: ModelMixin,
    config: CacheConfig,
    *,
    num_steps: int = 0,
    listener: Callable[[RunReport], None] | None = None,
) -> Iterator[CacheRun]:
    """One denoising run of `transformer` under the cache; the transformer is as before when the context ends.

    num_steps: of the run; needed for a target speedup, and for the last steps to be told by.
    listener: called with the report at the end.
    Raises ValueError for a model that no family serves, and for a target speedup that cannot be had.
    """
    family = family_of(transformer)
    if config.target_speedup:
        if num_steps < 1:
            raise ValueError("target_speedup needs num_steps, the number of denoising steps of the run; give both.")
        Budget(config.target_speedup, sum(len(stack.blocks_in(transformer)) for stack in family.stacks))
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    parallel = registry.get_hook(PARALLEL_HOOK)
    reduce = alone if parallel is None else parallel.ranks.sum
    run = CacheRun(family, config, rounding=rounding_of(transformer.modules()), reduce=reduce)
    registry.register_hook(FBCacheHook(transformer, run, num_steps), HOOK)
    try:
        yield run
    finally:
        registry.remove_hook(HOOK, recurse=False)
        report = run.report()
        logger.info(report.summary())
        if listener is not None:
            listener(report)


def apply_cache_on_pipe(
    pipe: Pipe,
    *,
    residual_diff_threshold: float | None = None,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    warmup_steps: int = 0,
    max_consecutive_hits: int = 0,
    order: int = 0,
    decision: str = "first_block",
    target_speedup: float = 0.0,
    residual_device: str = "model",
    listener: Callable[[RunReport], None] | None = None,
) -> Pipe:
    """Make every later call of this pipeline object sample with the first-block cache, and return it.

    The settings are those of `CacheConfig`. Applying again replaces them; other pipelines of the class are untouched.
    Raises ValueError for a pipeline without a transformer, or one whose transformer no family serves.
    """
    config = CacheConfig(
        residual_diff_threshold=residual_diff_threshold,
        start_percent=start_percent,
        end_percent=end_percent,
        warmup_steps=warmup_steps,
        max_consecutive_hits=max_consecutive_hits,
        order=order,
        decision=decision,
        target_speedup=target_speedup,
        residual_device=residual_device,
    )
    if getattr(pipe, "transformer", None) is None:
        raise ValueError(f"{type(pipe).__name__} has no transformer; the cache is for diffusion transformers.")
    family_of(pipe.transformer)

    def around(pipe: DiffusionPipeline, arguments: dict) -> AbstractContextManager:
        num_steps = len(arguments.get("sigmas") or ()) or arguments.get("num_inference_steps", 0)
        return cache_run(pipe.transformer, config, num_steps=num_steps, listener=listener)

    return around_calls(pipe, "fbcache", around)
