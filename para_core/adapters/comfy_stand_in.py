"""ComfyUI: stands in for a diffusion model that runs in other processes, in a twin of the MODEL that has no weights."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..run_state import Step
from .comfy_parts import DIFFUSION_MODEL, Ask, attribute

PARALLEL = "parallel"  # name of the option that makes a MODEL sample with a twin
Forward = Callable[[tuple, dict], "Tensor | list[Tensor]"]


@dataclass
class RemoteCall:
    """One model call with the cache that other processes make: what they need for it, and what they decided.

    conditionings: a key for each row chunk of the batch, to its name. decided ... num_bytes: filled in by the call.
    """

    conditionings: dict
    step: Step
    decided: bool = False
    reuses: bool = False
    measured: bool = True
    diffs: list[float | None] = field(default_factory=list)
    num_bytes: int = 0


class StandIn(nn.Module):
    """Has no weights; its forward is `forward_elsewhere(args, kwargs)`, and the rest as `attribute` gives it.

    The original is the MODEL's, and lives no longer for this: a stand-in stays after its run.
    """

    def __init__(self, model: ModelPatcher, forward_elsewhere: Forward, ask: Ask) -> None:
        super().__init__()
        self._model, self._forward_elsewhere, self._ask = weakref.ref(model), forward_elsewhere, ask

    @property
    def original(self) -> nn.Module:
        """Raises AttributeError once the MODEL is gone."""
        return self._model().model.diffusion_model

    @property
    def exchanged(self) -> Mapping[str, object]:
        """The MODEL's object patches, some of which are in the original."""
        return self._model().object_patches

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self.__dict__["_model"]()
            if model is None or name in ("original", "exchanged"):
                raise
            return attribute(self._model, self._ask, "", name)

    def forward(self, *args, **kwargs):
        return self._forward_elsewhere(args, kwargs)


def object_patches_of(model: ModelPatcher) -> Mapping[str, object]:
    """What nodes have exchanged in a MODEL, also where a twin samples for it."""
    return getattr(model.model.diffusion_model, "exchanged", model.object_patches)


class Twin(ModelPatcher):
    """A ModelPatcher whose model runs on ranks, on these devices."""

    devices: Sequence[torch.device] = ()

    @contextmanager
    def in_preparation(self) -> Iterator[None]:
        """While the host prepares a run, the model needs there what the ranks on the host's device do: often nothing.

        To make room for one device's need would be to take the device from the ranks of another twin that stands there.
        """
        base, whole = self.model, self.model.memory_required
        share = self.devices.count(self.load_device) / len(self.devices)
        base.memory_required = lambda *args, **kwargs: share * whole(*args, **kwargs)
        try:
            yield
        finally:
            del base.memory_required

    def get_free_memory(self, device: torch.device) -> float:
        """What the host asks before it puts conditionings into one call, each rank having a part of it."""
        return len(self.devices) * super().get_free_memory(device)


def twin_of(model: ModelPatcher, forward_elsewhere: Forward, ask: Ask, *, devices: Sequence[torch.device]) -> Twin:
    """A ModelPatcher that samples as `model` does, its diffusion model's forward being `forward_elsewhere`.

    ask: for what it computes outside its forward. devices: of the ranks that compute it.
    It shares everything else with `model` (sampling parameters, other packs' callbacks and wrappers), and neither loads
    nor moves its weights. `model` is not changed.
    """
    base = copy.copy(model.model)
    for kind in ("_modules", "_parameters", "_buffers"):
        base.__dict__[kind] = dict(base.__dict__[kind])
    base.diffusion_model = StandIn(model, forward_elsewhere, ask)
    base.current_patcher = None
    base.current_weight_patches_uuid = None
    base.model_loaded_weight_memory = 0
    base.device = model.load_device
    twin = Twin(base, load_device=model.load_device, offload_device=model.offload_device)
    twin.devices = tuple(devices)
    twin.object_patches = {
        name: value for name, value in model.object_patches.items() if not name.startswith(DIFFUSION_MODEL)
    }
    twin.model_options = model.model_options
    # Copies: what is added to the twin must not stay on the model.
    twin.callbacks, twin.wrappers = (
        {kind: {key: list(found) for key, found in by_key.items()} for kind, by_key in of_model.items()}
        for of_model in (model.callbacks, model.wrappers)
    )
    twin.additional_models = model.additional_models
    twin.attachments = model.attachments
    twin.force_cast_weights = model.force_cast_weights
    return twin
