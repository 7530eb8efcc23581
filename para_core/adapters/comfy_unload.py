"""ComfyUI: one model leaves its device, in every version of the host."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

CPU = torch.device("cpu")


def unload(model: ModelPatcher) -> None:
    """Have the host let go of the model's weights, and take LoRAs out of them.

    They are on the CPU then, also where the host itself leaves them on the device (--highvram, --gpu-only).
    """
    with _offloading_to_cpu([model, *_clones_in_use(model)]):
        _have_it_let_go(model)
    if model.offload_device != CPU:
        model.unpatch_model(CPU)  # loaders put it there at once
        for part in model.object_patches.values():
            if isinstance(part, nn.Module):
                part.to(CPU)


def _have_it_let_go(model: ModelPatcher) -> None:
    of_one = getattr(comfy.model_management, "unload_model_and_clones", None)  # not in ComfyUI 0.3
    if of_one is not None:
        elsewhere = model.load_device != comfy.model_management.get_torch_device()  # a node of the host's chooses it
        of_one(model, unload_additional_models=False, all_devices=elsewhere)
        return
    clones = _clones_in_use(model)
    others = [one for one in comfy.model_management.current_loaded_models if one.model not in clones]
    comfy.model_management.free_memory(1e30, model.load_device, others)


def _clones_in_use(model: ModelPatcher) -> list[ModelPatcher]:
    known = [one.model for one in comfy.model_management.current_loaded_models]
    return [one for one in known if one is not None and one.is_clone(model)]


@contextmanager
def _offloading_to_cpu(patchers: Iterable[ModelPatcher]) -> Iterator[None]:
    """That is where these go when they leave their device."""
    usual = {id(patcher): (patcher, patcher.offload_device) for patcher in patchers}
    try:
        for patcher, _ in usual.values():
            patcher.offload_device = CPU
        yield
    finally:
        for patcher, device in usual.values():
            patcher.offload_device = device
