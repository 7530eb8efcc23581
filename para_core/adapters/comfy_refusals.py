"""ComfyUI: what the Context-Parallel Launcher does not do is refused by name, before anything is started for it."""

from __future__ import annotations

from collections.abc import Callable

from comfy.model_patcher import ModelPatcher

from .comfy_compile import NAME as COMPILE
from .comfy_compile import CompileOption
from .comfy_options import WRAPPERS, option_of
from .comfy_quantized_linear import QuantizedLinear
from .comfy_stand_in import DIFFUSION_MODEL, PARALLEL, Twin
from .comfy_travel import INSIDE_MODEL, refuse_code

FOREIGN_COMPILE = {"torch.compile"}  # the host's key of what exchanges the diffusion model for a compiled one
AROUND_GUIDANCE = (
    "sampler_cfg_function", "sampler_pre_cfg_function", "sampler_post_cfg_function", "sampler_calc_cond_batch_function",
)  # fmt: skip
PATCHES = "set_model_options_patch_replace"  # the host's, for the options of one model call


def refuse_combinations(guider: object) -> None:
    """Raise ValueError for what does not go with the ranks: of other nodes of this pack, and of the guider."""
    compiled: CompileOption | None = option_of(guider, COMPILE)
    if compiled is not None and compiled.config.scope == "model":
        raise ValueError(
            'Compile Model has scope "model", but on several devices something happens between the blocks that cannot '
            'be compiled in one piece. Set scope to "blocks".'
        )
    if compiled is not None and compiled.config.reuses_outputs:
        setting = f'backend "{compiled.config.backend}" and mode "{compiled.config.mode}"'
        raise ValueError(
            f"Compile Model has {setting}, which records CUDA graphs; these cannot hold the exchange between devices. "
            'Set backend "inductor" and mode "default" or "max-autotune-no-cudagraphs".'
        )

    for name, second in vars(guider).items():
        if isinstance(second, ModelPatcher) and second is not guider.model_patcher and option_of(second, PARALLEL):
            raise ValueError(
                f"{type(guider).__name__} samples with a second model ({name}), which the Context-Parallel Launcher's "
                "processes cannot run beside the first. Connect the launcher to the first one only, or bypass it."
            )


def refuse_without_ranks(model: ModelPatcher) -> None:
    """Raise ValueError where the host is about to sample with a MODEL of the launcher itself, and not with its twin."""
    if not isinstance(model, Twin):
        raise ValueError(
            "a node samples with this model itself, and the Context-Parallel Launcher would have no effect. Connect "
            "the launcher to the first model of that node (of Dual Model CFG Guider, say), or bypass it."
        )


def _wrapper_keys(model: ModelPatcher) -> set[str]:
    """Of what runs around a model call, where the diffusion model could be exchanged."""
    return {key for key, found in model.wrappers.get(WRAPPERS.APPLY_MODEL, {}).items() if found}


def refuse(model: ModelPatcher) -> None:
    """Raise ValueError for what is on the MODEL that the ranks could not do."""
    foreign = [
        name
        for name, found in model.object_patches.items()
        if f"{name}.".startswith(DIFFUSION_MODEL) and not isinstance(found, QuantizedLinear)
    ]
    reasons = {
        f"another node exchanges parts of the model ({', '.join(foreign[:3])})": foreign,
        "another node compiles it (torch.compile; use Compile Model)": _wrapper_keys(model) & FOREIGN_COMPILE,
        "a scheduled LoRA or another weight hook changes it while sampling": model.hook_patches,
        "another node injects code into it": model.injections,
        "another node's guidance calls it with patched blocks (as SkipLayerGuidance does)": _patched_passes(model),
        "MultiGPU CFG Split shares it out already": model.additional_models.get("multigpu"),
    }
    for reason, found in reasons.items():
        if found:
            raise ValueError(
                f"{reason}, which the Context-Parallel Launcher cannot do. Remove it, or bypass the launcher."
            )
    options = model.model_options.get("transformer_options", {})
    refuse_code({**options, "wrappers": {kind: model.wrappers.get(kind, {}) for kind in INSIDE_MODEL}})


def _patched_passes(model: ModelPatcher) -> list[Callable]:
    """Functions around the guidance that call the model once more, with a patch made by the host's way."""
    found = [model.model_options.get(name) for name in AROUND_GUIDANCE]
    functions = [one for some in found for one in (some if isinstance(some, (list, tuple)) else [some])]
    return [one for one in functions if PATCHES in getattr(getattr(one, "__code__", None), "co_names", ())]
