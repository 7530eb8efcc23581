"""ComfyUI on a rank: weights in memory that the ranks of a machine share, a file's pages or what the server sent."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import comfy.utils
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Source = tuple[nn.Parameter, Tensor]  # a parameter, and the tensor that its value came from


class Place(NamedTuple):
    """A parameter in a model, under the host's name for it, and its shared tensor."""

    module: nn.Module
    name: str
    key: str
    tensor: Tensor


class TakingOver(TorchFunctionMode):
    """While a loader runs, a parameter takes over the memory of what is copied into it, where nothing is to be cast.

    As `assign` of the host's `load_model_weights` does, which its loaders ask for only with memory management that no
    rank has (comfy_aimdo). What the loader allocated is never written to, so it costs no memory either.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[Source] = []

    def __torch_function__(
        self, function: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        if function is Tensor.copy_ and len(args) == 2 and _holds_as_it_is(*args):
            parameter, source = args[0], args[1].detach()
            self.sources.append((parameter, source))
            if parameter.device == source.device:
                parameter.data = source
                return parameter
        return function(*args, **(kwargs or {}))


def _holds_as_it_is(parameter: Tensor, source: Tensor) -> bool:
    """Contiguous, since kernels may sum in another order over another layout."""
    return (
        type(parameter) is nn.Parameter
        and type(source) in (Tensor, nn.Parameter)
        and (parameter.dtype, parameter.shape) == (source.dtype, source.shape)
        and parameter.is_contiguous()
        and source.is_contiguous()
    )


class GoingBack(TorchFunctionMode):
    """While a host moves modules off the device, their weights become the shared tensors again; nothing is copied."""

    def __init__(self, places: Iterable[Place]) -> None:
        super().__init__()
        # The parameter too: as long as it lives, no other tensor has its id.
        found = ((getattr(place.module, place.name), place.tensor) for place in places)
        self._shared = {id(parameter): (parameter, tensor) for parameter, tensor in found}

    def __torch_function__(
        self, function: Callable, types: Iterable[type], args: tuple = (), kwargs: Mapping | None = None
    ) -> object:
        if function is Tensor.to and id(args[0]) in self._shared:  # by Module.to, whose first argument is the device
            tensor = self._shared[id(args[0])][1]
            if args[1:2] == (tensor.device,):
                return tensor
        return function(*args, **(kwargs or {}))


class SharingPatcher(ModelPatcher):
    """A ModelPatcher that puts its weights back as they lie in shared memory when they leave the device.

    The host's own copies them back, on every rank; the shared ones stay where they are, and cost nothing.
    """

    places: tuple[Place, ...] = ()

    @property
    def _shared_now(self) -> Iterator[Place]:
        """Without weights with a LoRA in them, which the host puts back itself: its backup is the shared tensor."""
        return (place for place in self.places if place.key not in self.backup)

    @classmethod
    def of(cls, patcher: ModelPatcher, sources: Iterable[Source]) -> ModelPatcher:
        """The same patcher with this behaviour; sources: in memory that the ranks share."""
        if type(patcher) is not ModelPatcher:
            return patcher
        own = cls(patcher.model, load_device=patcher.load_device, offload_device=patcher.offload_device)
        vars(own).update(vars(patcher))
        own.places = tuple(_places(patcher.model, sources))
        return own

    def clone(self, *args, **kwargs) -> ModelPatcher:
        clone = super().clone(*args, **kwargs)
        clone.places = self.places
        return clone

    def partially_unload(self, *args, **kwargs) -> float:
        with GoingBack(self._shared_now):
            return super().partially_unload(*args, **kwargs)

    def pin_weight_to_device(self, key: str) -> None:
        """Not the shared ones: to register the private pages of a file with CUDA is to copy them, on every rank."""
        if key not in {place.key for place in self.places}:
            super().pin_weight_to_device(key)  # never called by ComfyUI 0.3, which pins nothing

    def unpatch_model(self, device_to=None, unpatch_weights: bool = True) -> None:
        if unpatch_weights:
            if getattr(self, "pinned", None):  # ComfyUI 0.3 pins nothing
                self.unpin_all_weights()
            self._put_back()
        super().unpatch_model(device_to, unpatch_weights)

    def _put_back(self) -> None:
        for module, name, _, tensor in self._shared_now:
            if getattr(module, name).data_ptr() != tensor.data_ptr():
                comfy.utils.set_attr_param(module, name, tensor)


def share_exchanged(patcher: ModelPatcher, tensors: Iterable[Tensor]) -> None:
    """Have the layers that this patcher exchanges go back to shared memory too. tensors: what lies there of them."""
    if isinstance(patcher, SharingPatcher):
        shared = {tensor.data_ptr() for tensor in (*tensors, *(place.tensor for place in patcher.places))}
        patcher.places += tuple(place for place in _exchanged(patcher) if place.tensor.data_ptr() in shared)


def private_bytes(patcher: ModelPatcher) -> int:
    """Of its weights, what this process alone holds beside the device: also those that others stand in for."""
    shared = {(id(place.module), place.name) for place in getattr(patcher, "places", ())}
    weights = [*_parameters("", patcher.model), *_exchanged(patcher)]
    kept = [one for one in weights if (id(one.module), one.name) not in shared]
    used = {one.key: one for one in weights}
    # Where the host computes in the memory that it loads from, LoRAs are merged into copies there.
    merged = patcher.patches.keys() & used.keys() if patcher.load_device == patcher.offload_device else ()
    return sum(one.tensor.nbytes for one in (*kept, *(used[key] for key in merged)))


def _exchanged(patcher: ModelPatcher) -> Iterator[Place]:
    """Of the modules that a patcher puts into its model while that is loaded."""
    for path, layer in patcher.object_patches.items():
        if isinstance(layer, nn.Module):
            yield from _parameters(path, layer)


def _parameters(path: str, module: nn.Module) -> Iterator[Place]:
    for inner, owner in module.named_modules(prefix=path):
        for name, parameter in owner.named_parameters(recurse=False):
            yield Place(owner, name, f"{inner}.{name}", parameter)


def _places(model: nn.Module, sources: Iterable[Source]) -> Iterator[Place]:
    tensors = {id(parameter): tensor for parameter, tensor in sources}
    for module, name, key, parameter in _parameters("", model):
        if (tensor := tensors.get(id(parameter))) is not None:
            yield Place(module, name, key, tensor)


def in_mapped_files(sources: Iterable[Source]) -> list[Source]:
    """Those whose tensor lies in the pages of a file; none where the system does not say (it does on Linux)."""
    found = re.finditer(r"^(\w+)-(\w+) \S+ \S+ \S+ [1-9]\d*", _own_memory(), re.MULTILINE)
    ranges = [range(int(start, 16), int(end, 16)) for start, end in (match.groups() for match in found)]
    return [source for source in sources if any(source[1].data_ptr() in pages for pages in ranges)]


def _own_memory() -> str:
    maps = Path("/proc/self/maps")
    return maps.read_text() if maps.exists() else ""
