"""ComfyUI: torch.compile on a MODEL, realised while it samples, through the host's wrappers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from weakref import WeakKeyDictionary

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..artifact_cache import ArtifactCache
from ..compilation import Compilation, refuse
from ..compile_config import CompileConfig, compile_obstacle
from ..compile_report import CompileReport
from ..families import ModelFamily, family_of
from .comfy_fbcache import NAME as CACHE
from .comfy_options import KEY, WRAPPERS, attach, diffusion_model_of, option_of, patches_inside
from .comfy_stand_in import PARALLEL

logger = logging.getLogger(__name__)

NAME = "compile"
CACHE_INSIDE = "scope model compiles in one piece what the FBCache Patcher decides between the blocks"
AROUND_MODEL = WRAPPERS.DIFFUSION_MODEL  # the host calls these inside the diffusion model's forward
BETWEEN = {KEY, "patches_replace", "wrappers", "callbacks"}  # options that no block reads
# What was compiled for a model lasts as long as the model: a node behind a changed LoRA is executed again, and must
# find it. No run state is in here.
_compilations: WeakKeyDictionary[nn.Module, dict[CompileConfig, Compilation]] = WeakKeyDictionary()


@dataclass
class CompileLog:
    """The report of the latest run of a MODEL; all clones behind one node share it."""

    report: CompileReport | None = None


@dataclass(frozen=True)
class CompileOption:
    """What Compile Model leaves on a MODEL. family: None with scope model."""

    compilation: Compilation
    family: ModelFamily | None
    listener: Callable[[CompileReport], None] | None = None
    log: CompileLog = field(default_factory=CompileLog)

    def __deepcopy__(self, memo: dict) -> CompileOption:
        return self  # ComfyUI 0.3 copies the options of every clone

    @property
    def config(self) -> CompileConfig:
        return self.compilation.config

    def tell(self, report: CompileReport) -> None:
        """Of blocks that run in other processes: their report as it stands."""
        self.log.report = report
        if self.listener is not None:
            self.listener(report)


def apply_compile(
    model: ModelPatcher,
    config: CompileConfig,
    *,
    directory: Path | None = None,
    listener: Callable[[CompileReport], None] | None = None,
) -> ModelPatcher:
    """A clone of `model` that samples with compiled code; `model` itself is not changed.

    Nothing is compiled before the first run. directory: where artifacts are kept for the next process.
    listener: called while something is compiled and when a run has ended. Raises ValueError for a model that no family
    serves (scope blocks), and where nothing can be compiled unless the config allows to run uncompiled.
    """
    diffusion_model = diffusion_model_of(model.model)
    family = family_of(diffusion_model) if config.scope == "blocks" else None
    obstacle = compile_obstacle(config, model.load_device)
    if obstacle is not None:
        refuse(obstacle, config)
    model = _without_dynamic_vram(model)
    by_config = _compilations.setdefault(diffusion_model_of(model.model), {})
    if config not in by_config:
        cache = None if directory is None else ArtifactCache(directory, model.load_device)
        by_config[config] = Compilation(config, cache)
    return attach(
        model, NAME, CompileOption(by_config[config], family, listener), {WRAPPERS.OUTER_SAMPLE: _outer_sample}
    )


def has_compile(model: ModelPatcher) -> bool:
    """Whether this MODEL samples with compiled code."""
    return option_of(model, NAME) is not None


def last_compile_report(model: ModelPatcher) -> CompileReport | None:
    """The report of this MODEL's latest run with compiled code; None before there was one, or without the node."""
    option: CompileOption | None = option_of(model, NAME)
    return None if option is None else option.log.report


def _outer_sample(executor, *args, **kwargs):
    """Let the model's blocks run compiled code for this sampling run."""
    guider = executor.class_obj
    option: CompileOption = guider.model_options["transformer_options"][KEY][NAME]
    if option_of(guider, PARALLEL) is not None:  # the launcher's processes compile, and fill in the log
        return executor(*args, **kwargs)
    model = diffusion_model_of(guider.model_patcher.model)
    entrance = HostEntrance(whole=option.config.scope == "model")
    if entrance.whole and option_of(guider, CACHE) is not None:
        refuse(f"{CACHE_INSIDE}; choose scope blocks, or remove one of the two nodes", option.config)
    with option.compilation.run(model, option.family, entrance=entrance, listener=option.listener) as run:
        try:
            return executor(*args, **kwargs)
        finally:
            option.log.report = run.report()


class HostEntrance:
    """Which block calls of a run are better left uncompiled, and the options that compiled code sees.

    The host's cancel button takes effect here, from block to block. whole: the model is compiled as one block.
    """

    def __init__(self, *, whole: bool = False) -> None:
        self.whole = whole
        self._moved: dict[nn.Module, bool] = {}

    def __call__(self, block: nn.Module, args: tuple, kwargs: dict) -> tuple[str | None, tuple, dict]:
        comfy.model_management.throw_exception_if_processing_interrupted()
        inside: set[str] = set()

        def slim(value: object) -> object:
            if not isinstance(value, dict) or "cond_or_uncond" not in value:
                return value
            inside.update(self._patches_inside(value))
            # Torch guards how many there are, and nodes add and remove these.
            return {key: kept for key, kept in value.items() if key not in BETWEEN} | {"patches": {}}

        given = tuple(map(slim, args)), {name: slim(value) for name, value in kwargs.items()}
        if inside:
            # Compiled, a patch would be taken for constant; other packs change theirs from step to step.
            where = "model" if self.whole else "block"
            return f"another node's patch inside the {where} ({', '.join(sorted(inside))})", *given
        if block not in self._moved:
            self._moved[block] = any(
                getattr(layer, "weight_function", None) or getattr(layer, "bias_function", None)
                for layer in block.modules()
            )
        return ("its weights are offloaded, with a LoRA on them" if self._moved[block] else None), *given

    def _patches_inside(self, options: Mapping) -> Iterator[str]:
        """Names of the patches of other nodes that run within what is compiled."""
        if self.whole and CACHE in options.get(KEY, {}):
            yield "FBCache Patcher"
            return
        inside = patches_inside(options)
        if self.whole:
            around = options.get("patches", {}), options.get("patches_replace", {})
            for found in (*around, options.get("wrappers", {}).get(AROUND_MODEL, {})):
                inside |= found
        yield from (str(name) for name, found in inside.items() if found)


def _without_dynamic_vram(model: ModelPatcher) -> ModelPatcher:
    """Weights that come and go while a block runs cannot be compiled; as the host's own compile node does."""
    if getattr(model, "is_dynamic", bool)() and getattr(model, "cached_patcher_init", None) is not None:
        return model.clone(disable_dynamic=True)
    return model
