"""ComfyUI: the models that a group of ranks has built for this process, as long as this process has them itself."""

from __future__ import annotations

import hashlib
import uuid
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from torch import nn

from ..workers import Shared
from .comfy_bare_modules import is_dynamic
from .comfy_quantization import quantized_layers, quantized_weights
from .comfy_rank_models import computing_dtype, quantized_to
from .comfy_stand_in import DIFFUSION_MODEL
from .comfy_travel import pack_module, pack_to_send, recipe_of

Ask = Callable[[str, Mapping], object]  # (method, payload) -> the answer of the ranks


@dataclass
class Built:
    """A model that the ranks have. owner: the host's; dead: nobody will ask for it again.

    private_bytes: of weights that every rank holds for itself. sent: bytes of those that the ranks share but the host
    has once more, by the method that brought them. quantization, variant: with which quantized weights, and which LoRAs
    on them; None where that is not known.
    """

    owner: weakref.ref
    private_bytes: int
    sent: dict[str, int]
    quantization: str | None = ""
    variant: str | None = None

    @property
    def num_bytes(self) -> int:
        """What forgetting it frees, at least."""
        return self.private_bytes + sum(self.sent.values())


class Prepared:
    """Asks the ranks for what they lack of a model, and has them forget those that the host has dropped.

    Holds no model, and nothing of its weights: after a restart it takes them from the host's once more.
    """

    def __init__(self, ask: Ask, num_ranks: int, dropped: Callable[[], None] = lambda: None) -> None:
        """dropped: called when the host drops one of the models, in any thread and in the middle of anything."""
        self._ask, self._num_ranks, self._dropped = ask, num_ranks, dropped
        self._names: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()  # without a recipe
        self._built: dict[str, Built] = {}
        self._latest: weakref.ref[ModelPatcher] | None = None
        self._vae: weakref.ref[ModelPatcher] | None = None
        self._vae_model: tuple[str, weakref.ref[nn.Module]] | None = None  # on the ranks

    def model(self, model: ModelPatcher) -> dict:
        """Have the ranks build `model` with its LoRAs and quantized weights; returns what names it there.

        A model that they have already costs nothing; one that differs in its LoRAs only costs sending those.
        """
        recipe = recipe_of(model)
        name = self._name(model, recipe)
        # Of a module that is sent all ranks map the same memory; a loader may make a copy on every rank.
        self._make_room(name, model, num_copies=1 if recipe is None else self._num_ranks)
        if name not in self._built:
            self._latest = None  # ranks that are lost now come back empty
            source = _source(model, recipe)
            answer = self._ask("load", {"model": name, "keep": list(self._built), **source})
            sent = {"load": source["tensors"].num_bytes}
            self._built[name] = Built(self._watched(model.model), answer["private_bytes"], sent)
        built, self._latest = self._built[name], weakref.ref(model)
        built.owner = self._watched(model.model)
        self._quantize(name, built, model)
        return self._patch(name, built, model)

    def built_as(self, model: ModelPatcher) -> str | None:
        """What names `model` on the ranks, where they have it with these quantized weights, whatever its LoRAs."""
        name = self._name(model, recipe_of(model))
        there = name in self._built and self._built[name].quantization == self._quantization(model)
        return name if there else None

    def _quantize(self, name: str, built: Built, model: ModelPatcher) -> None:
        quantization = self._quantization(model)
        if built.quantization == quantization:
            return
        layers, tensors = quantized_to(quantized_weights(model))
        payload = {"model": name, "quantization": quantization, "layers": layers, "tensors": Shared(tensors)}
        # Of what the ranks drop for it they have nothing left, also where this is cancelled or fails.
        built.quantization = built.variant = None
        self._ask("quantize", payload)
        built.quantization, built.sent["quantize"] = quantization, payload["tensors"].num_bytes

    def _patch(self, name: str, built: Built, model: ModelPatcher) -> dict:
        names = {"model": name, "variant": str(model.patches_uuid)}
        if built.variant != names["variant"]:
            payload = names | _patch_payload(model)
            built.variant = None  # as above
            built.private_bytes = self._ask("patch", payload)["private_bytes"]
            built.variant = names["variant"]
        return names

    def vae(self, vae: ModelPatcher) -> dict:
        """The same for a VAE's patcher: the ranks have the model of one VAE, beside the diffusion models."""
        name = self._name_of_module(vae.model)
        there = None if self._vae is None else self._vae()
        if there is None or there.model is not vae.model:
            payload = {"model": name, **_module_payload(vae.model, vae)}
            self._vae = None  # as above
            self._ask("load_vae", payload)
            self._vae_model = name, self._watched(vae.model)
        self._vae = weakref.ref(vae)
        return {"model": name}

    def take_dropped(self) -> list[str]:
        """What the ranks have of the host's dropped models, by the names there; whoever asks has them forget it.

        Not those that lie in a file's pages alone: they take no memory, and may be loaded again under their name.
        """
        names = [name for name in self._without_owner() if self._built[name].num_bytes]
        for name in names:
            del self._built[name]
        if self._vae_model is not None and self._vae_model[1]() is None:
            names.append(self._vae_model[0])
            self._vae = self._vae_model = None
        return names

    def _without_owner(self) -> list[str]:
        return [name for name, built in self._built.items() if built.owner() is None]

    def _watched(self, module: nn.Module) -> weakref.ref:
        return weakref.ref(module, lambda _: self._dropped())

    def restore(self) -> None:
        """The ranks are new: bring back what the latest calls are about. The rest follows when it is needed."""
        built, self._built = self._built, {}
        model = None if self._latest is None else self._latest()
        vae, self._vae, self._vae_model = None if self._vae is None else self._vae(), None, None
        if model is not None and built:
            self.model(model)
        if vae is not None:
            self.vae(vae)

    def _name(self, model: ModelPatcher, recipe: tuple[str, bytes] | None) -> str:
        return self._name_of_module(model.model.diffusion_model) if recipe is None else recipe[0]

    def _name_of_module(self, module: nn.Module) -> str:
        return self._names.setdefault(module, uuid.uuid4().hex)

    def _quantization(self, model: ModelPatcher) -> str:
        """What tells these quantized weights from others; clones with other LoRAs share them. Empty without any."""
        layers = [f"{path} {self._name_of_module(layer)}" for path, layer in sorted(quantized_layers(model).items())]
        return hashlib.sha256("\n".join(layers).encode()).hexdigest() if layers else ""

    def _make_room(self, name: str, model: ModelPatcher, *, num_copies: int) -> None:
        """Have the ranks forget what the host has dropped, and copies of weights where the next model needs the memory.

        Weights in the pages of a file stay.
        """
        leaving = [other for other in self._without_owner() if other != name]
        if name not in self._built:
            free = comfy.model_management.get_free_memory(torch.device("cpu"))
            if free < num_copies * model.model_size():
                leaving += [other for other, built in self._built.items() if built.num_bytes]
        if leaving:
            for other in leaving:
                self._built.pop(other, None)
            self._ask("forget", {"models": leaving})


def _source(model: ModelPatcher, recipe: tuple[str, bytes] | None) -> dict:
    if recipe is not None:
        return {"recipe": recipe[1], "module": b"", "tensors": Shared([])}
    return {"recipe": None, **_module_payload(model.model.diffusion_model, model)}


def _module_payload(module: nn.Module, of: ModelPatcher) -> dict:
    """The module itself, its weights in memory that all ranks of this machine share."""
    packed, tensors = pack_module(module, dynamic=is_dynamic(of))
    return {"module": packed, "tensors": Shared(tensors)}


def _patch_payload(model: ModelPatcher) -> dict:
    own = {name: found for name, found in model.patches.items() if name.startswith(DIFFUSION_MODEL)}
    packed, tensors = pack_to_send(own, "a LoRA or another patch of the weights", "Remove it")
    return {
        "patches": packed,
        "patch_tensors": Shared(tensors),
        "force_cast_weights": model.force_cast_weights,
        "dtype": computing_dtype(model.model),
    }
