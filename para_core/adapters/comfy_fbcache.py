"""ComfyUI: the first-block cache on a MODEL, realised while it samples, through the host's wrappers and hooks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from comfy.model_patcher import ModelPatcher

from ..between_blocks import loudness
from ..block_forward import swapped_forwards
from ..budget import Budget
from ..cache_report import RunReport
from ..cache_run import CacheRun
from ..families import ModelFamily, family_of
from ..first_block import CachedCall
from ..quantization_scheme import rounding_of
from ..residual_cache import CacheConfig
from .comfy_cache_run import FBCacheOption, SamplingRun
from .comfy_conditionings import conditionings_of
from .comfy_options import (
    KEY,
    WRAPPERS,
    attach,
    diffusion_model_of,
    option_of,
    options_of,
    patches_in_range,
    patches_inside,
)
from .comfy_quantized_model import stored_linears
from .comfy_stand_in import RemoteCall, StandIn, object_patches_of

logger = logging.getLogger(__name__)

NAME = "fbcache"


def apply_fbcache(
    model: ModelPatcher, config: CacheConfig, *, listener: Callable[[RunReport], None] | None = None
) -> ModelPatcher:
    """A clone of `model` that samples with the first-block cache; `model` itself is not changed.

    A cache that was attached before is replaced. listener: called with the report while a run goes on, and
    when it has ended (`finished`). Raises ValueError for a model that no family serves.
    """
    diffusion_model = diffusion_model_of(model.model)
    family = family_of(diffusion_model)
    if config.target_speedup:  # refused here, not in the middle of sampling
        Budget(config.target_speedup, sum(len(stack.blocks_in(diffusion_model)) for stack in family.stacks))
    wrappers = {
        WRAPPERS.OUTER_SAMPLE: _outer_sample,
        WRAPPERS.PREDICT_NOISE: _predict_noise,
        WRAPPERS.APPLY_MODEL: _apply_model,
    }
    return attach(model, NAME, FBCacheOption(family, config, listener), wrappers)


def has_fbcache(model: ModelPatcher) -> bool:
    """Whether this MODEL samples with the first-block cache."""
    return option_of(model, NAME) is not None


def last_report(model: ModelPatcher) -> RunReport | None:
    """The report of this MODEL's latest run with the cache; None before there was one, or without a patcher."""
    option: FBCacheOption | None = option_of(model, NAME)
    return None if option is None else option.log.report


def _outer_sample(executor, *args, **kwargs):
    """Give the sampling run a state of its own, on the guider's per-run copy of the model options."""
    guider = executor.class_obj
    options = guider.model_options["transformer_options"]
    fbcache: FBCacheOption = options[KEY][NAME]
    sampling = guider.model_patcher.get_model_object("model_sampling")
    start, end = fbcache.config.start_percent, fbcache.config.end_percent
    run = SamplingRun(
        CacheRun(fbcache.family, fbcache.config, rounding=rounding_of(_quantized_layers(guider.model_patcher))),
        fbcache,
        # At 0 without the host's answer: a sampler may start above the model's highest sigma.
        (float(sampling.percent_to_sigma(start)) if start > 0 else math.inf, float(sampling.percent_to_sigma(end))),
        lambda sigma: float(sampling.timestep(torch.tensor(sigma))),
        hooked=bool(guider.model_patcher.hook_patches),
    )
    options[KEY] = {**options[KEY], "run": run}
    try:
        return executor(*args, **kwargs)
    finally:
        del options[KEY]["run"]
        fbcache.log.report = run.tell(finished=True)
        logger.info(fbcache.log.report.summary())


def _predict_noise(executor, x, timestep, model_options, *args, **kwargs):
    """One evaluation by the sampler: the main pass, and whatever passes guidance adds to it."""
    run: SamplingRun | None = options_of(model_options["transformer_options"]).get("run")
    if run is None:
        return executor(x, timestep, model_options, *args, **kwargs)
    run.seen = set()
    try:
        return executor(x, timestep, model_options, *args, **kwargs)
    finally:
        run.seen = None


def _apply_model(executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **kwargs):
    """Put the cache around the blocks of this one model call; without a run (a foreign sampler) do nothing."""
    options = transformer_options or {}
    run: SamplingRun | None = options_of(options).get("run")
    if run is None:
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    found = diffusion_model_of(executor.class_obj)
    model = found.original if isinstance(found, StandIn) else found
    try:
        family = family_of(model)
    except ValueError:  # a guider's second model, of a family without a cache: it runs as it is
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    num_blocks = [len(stack.blocks_in(model)) for stack in family.stacks]
    conditionings, step = conditionings_of(model, x, options, run.seen), run.step(options)
    if not run.cache.off:
        controlled = (*loudness(control), *patches_in_range(options, step.sigma))
        step = replace(step, controlled=controlled, foreseeable=not (run.hooked or patches_inside(options)))
    if run.cache.off:
        with run.cache.counted(num_blocks, conditionings, step):
            output = executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
    elif isinstance(found, StandIn):
        call = RemoteCall(conditionings, step)
        options = {**options, KEY: {**options[KEY], "call": call}}
        with run.cache.noted(call, num_blocks, conditionings, step):
            output = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        run.num_bytes = call.num_bytes
    else:
        with (
            run.cache.call(family, num_blocks, conditionings, step) as call,
            swapped_forwards(model, family, call),
        ):
            options = _with_block_patches(options, family, num_blocks, call)
            output = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
    run.tell(finished=False)
    return output


def _with_block_patches(
    options: Mapping, family: ModelFamily, num_blocks: list[int], call: CachedCall
) -> dict[str, object]:
    """A copy of the transformer options in which every block of the family asks `call`.

    What stands at a key already (another pack's patch, for the run or for this pass only) is called inside ours.
    """
    replace = dict(options.get("patches_replace", {}))
    dit = replace["dit"] = dict(replace.get("dit", {}))
    for number, (stack, count) in enumerate(zip(family.stacks, num_blocks, strict=True)):
        for index in range(count if stack.hook is not None else 0):
            key = (stack.hook, index)
            dit[key] = _block_patch(call, number, index, dit.get(key))
    return {**options, "patches_replace": replace}


def _block_patch(call: CachedCall, stack: int, index: int, inner: Callable | None) -> Callable:
    def patch(args: dict, extra: dict) -> dict:
        if inner is None:
            return call.block(stack, index, args, lambda: extra["original_block"](args))
        return call.block(stack, index, args, lambda: inner(args, extra), patched=True)

    return patch


def _quantized_layers(model: ModelPatcher) -> Iterator[object]:
    """Those of the quantization nodes, and of the model's own file; not what another clone has in the model."""
    yield from object_patches_of(model).values()
    yield from (layer for _, layer in stored_linears(model))
