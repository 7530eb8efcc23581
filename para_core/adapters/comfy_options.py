"""ComfyUI: what the nodes leave on a MODEL: a frozen option for each node, and the wrappers that realise it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import comfy.patcher_extension
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import nn

# The one key of ours in transformer_options; in front of a dot, also of our keys among the host's wrappers.
KEY = "para_accelerate"
WRAPPERS = comfy.patcher_extension.WrappersMP
BETWEEN_BLOCKS = {"post_input", "double_block", "noise_refiner"}  # list patches that the host calls there


def attach(model: ModelPatcher, name: str, option: object, wrappers: Mapping[str, Callable]) -> ModelPatcher:
    """A clone that carries `option` under `name`, in place of the one it had; `model` itself is not changed.

    wrappers: kind (of WRAPPERS) to what the host calls. They read the option when they run, so that the order in which
    the nodes of this pack are wired plays no part.
    """
    clone = model.clone()
    clone.model_options["transformer_options"].setdefault(KEY, {})[name] = option
    for kind, wrapper in wrappers.items():
        clone.remove_wrappers_with_key(kind, f"{KEY}.{name}")
        clone.add_wrapper_with_key(kind, f"{KEY}.{name}", wrapper)
    return clone


def options_of(transformer_options: Mapping | None) -> Mapping[str, object]:
    """Our options, by name; empty for a MODEL without any."""
    return (transformer_options or {}).get(KEY, {})


def option_of(model: ModelPatcher, name: str) -> object | None:
    """The option that a MODEL carries under `name`, or None."""
    return options_of(model.model_options["transformer_options"]).get(name)


def diffusion_model_of(model: BaseModel) -> nn.Module:
    """The diffusion model itself, also where another pack has compiled it."""
    return getattr(model.diffusion_model, "_orig_mod", model.diffusion_model)


def patches_in_range(transformer_options: Mapping, sigma: float) -> tuple[float, ...]:
    """1 for each patch between the blocks that acts at this sigma, else 0, of those that say where they do.

    The host's own say it by sigma_start and sigma_end (Uni3C).
    """
    patches = [patch for found in transformer_options.get("patches", {}).values() for patch in found]
    return tuple(
        float(patch.sigma_end <= sigma <= patch.sigma_start)
        for patch in patches
        if hasattr(patch, "sigma_start") and hasattr(patch, "sigma_end")
    )


def patches_inside(transformer_options: Mapping) -> dict[str, object]:
    """Other nodes' patches that the host calls within the blocks, by name; those called "dit" stand around blocks."""
    patches = {k: v for k, v in transformer_options.get("patches", {}).items() if k not in BETWEEN_BLOCKS}
    replaced = {k: v for k, v in transformer_options.get("patches_replace", {}).items() if k != "dit"}
    return {name: found for name, found in {**patches, **replaced}.items() if found}
