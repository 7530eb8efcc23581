"""ComfyUI: learns when the host wants the memory of a device on which ranks have something, and it itself nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import comfy.model_management as management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import nn


class OnOtherProcesses(nn.Module):
    """In the host's list of models, in the place of what the ranks have on a device."""


class DeviceWatch:
    """Stands in the host's list of models with nothing of any size on each of some devices."""

    def __init__(self, wanted: Callable[[ModelPatcher, bool], None]) -> None:
        """wanted: called as the host calls back when a model is to leave its device (`ON_DETACH`)."""
        self._wanted = wanted
        self._patchers: dict[torch.device, ModelPatcher] = {}

    def __contains__(self, patcher: ModelPatcher) -> bool:
        return any(patcher is one for one in self._patchers.values())

    def stand_on(self, devices: Iterable[torch.device]) -> None:
        """See to it that something stands on those of these devices whose memory the host takes care of.

        Until it is made to leave, which a later call makes good.
        """
        # ComfyUI 0.3 takes care of one device only, where a model of its own can tell.
        in_care = getattr(management, "get_all_torch_devices", list)()
        devices = [device for device in in_care if device in set(devices)]
        self._patchers = {device: self._patchers.get(device) or self._patcher(device) for device in devices}
        standing = {id(one.model) for one in management.current_loaded_models}
        if missing := [patcher for patcher in self._patchers.values() if id(patcher) not in standing]:
            management.load_models_gpu(missing)

    @property
    def devices(self) -> set[torch.device]:
        return set(self._patchers)

    def _patcher(self, device: torch.device) -> ModelPatcher:
        patcher = ModelPatcher(OnOtherProcesses(), load_device=device, offload_device=torch.device("cpu"))
        patcher.add_callback_with_key(CallbacksMP.ON_DETACH, __name__, self._wanted)
        return patcher
