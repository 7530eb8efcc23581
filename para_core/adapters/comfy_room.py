"""ComfyUI: the room that the host makes on its devices for the ranks that run there too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import comfy.model_management
import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher

from .comfy_session import Session


def make_room(
    model: ModelPatcher, session: Session, *, missing: Sequence[int], memory: float, conds: Mapping[str, list]
) -> None:
    """Have the host leave the devices that it takes care of to the ranks that run there too.

    What the host keeps on one (text encoders, blocks of freed memory) would let that rank load its weights only in
    part, and all others would wait for it in every call. missing: bytes of weights that each rank lacks. memory: of a
    rank's activations, bytes. conds: of the run; models in them (ControlNets) stay, or have their room beside.
    """
    management = comfy.model_management
    # ComfyUI 0.3 takes care of one device only.
    in_care = dict.fromkeys([model.load_device, *getattr(management, "get_all_torch_devices", list)()])
    devices = [device for device in in_care if device.type != "cpu" and device in session.devices]
    needed = max(memory + management.extra_reserved_memory(), management.minimum_inference_memory())
    others, working_memory = comfy.sampler_helpers.get_additional_models(conds, model.model_dtype())
    # To detach what stands for the ranks would be to unload them.
    kept = [
        one for one in management.current_loaded_models if session.stands_for_ranks(one.model) or one.model in others
    ]
    for device in devices:
        # Ranks on several machines may call their devices by one name.
        weights = max(lacked for there, lacked in zip(session.devices, missing, strict=True) if there == device)
        weights += sum(max(0, one.model_size() - one.loaded_size()) for one in others if one.load_device == device)
        used = needed + (working_memory if device == model.load_device else 0)
        management.free_memory(1.1 * weights + used, device, kept)  # as the host asks before it loads a model
    if devices:
        management.soft_empty_cache()
