"""ComfyUI: stands in for a diffusion model that runs in other processes, in a twin of the MODEL that has no weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..run_state import Step

DIFFUSION_MODEL = "diffusion_model."
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
    """Has no weights; its forward is `forward_elsewhere(args, kwargs)`, and the rest is the original's."""

    def __init__(self, original: nn.Module, forward_elsewhere: Forward, exchanged: Mapping[str, object]) -> None:
        """exchanged: the MODEL's object patches, some of which are in the original."""
        super().__init__()
        # In a tuple: as a submodule its weights would count as ours, and be loaded.
        self._elsewhere = (original, forward_elsewhere)
        self.exchanged = exchanged

    @property
    def original(self) -> nn.Module:
        return self._elsewhere[0]

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.original, name)

    def forward(self, *args, **kwargs):
        return self._elsewhere[1](args, kwargs)


def object_patches_of(model: ModelPatcher) -> Mapping[str, object]:
    """What nodes have exchanged in a MODEL, also where a twin samples for it."""
    return getattr(model.model.diffusion_model, "exchanged", model.object_patches)


def twin_of(model: ModelPatcher, forward_elsewhere: Forward) -> ModelPatcher:
    """A ModelPatcher that samples as `model` does, its diffusion model's forward being `forward_elsewhere`.

    It shares everything else with `model` (sampling parameters, other packs' callbacks and wrappers), and neither loads
    nor moves its weights. `model` is not changed.
    """
    base = copy.copy(model.model)
    for kind in ("_modules", "_parameters", "_buffers"):
        base.__dict__[kind] = dict(base.__dict__[kind])
    base.diffusion_model = StandIn(model.model.diffusion_model, forward_elsewhere, model.object_patches)
    base.current_weight_patches_uuid = None
    base.model_loaded_weight_memory = 0
    base.device = model.load_device
    twin = ModelPatcher(base, load_device=model.load_device, offload_device=model.offload_device)
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
