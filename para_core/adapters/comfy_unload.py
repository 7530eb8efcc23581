"""ComfyUI: one model leaves its device, in every version of the host."""

from __future__ import annotations

import comfy.model_management
from comfy.model_patcher import ModelPatcher


def unload(model: ModelPatcher) -> None:
    """Have the host let go of the model's weights, and take LoRAs out of them."""
    of_one = getattr(comfy.model_management, "unload_model_and_clones", None)  # not in ComfyUI 0.3
    if of_one is not None:
        of_one(model, unload_additional_models=False)
        return
    loaded = comfy.model_management.current_loaded_models
    others = [one for one in loaded if one.model is None or not one.model.is_clone(model)]
    comfy.model_management.free_memory(1e30, model.load_device, others)
