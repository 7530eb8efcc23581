"""ComfyUI on a rank: a model as the server has it, from its loader's recipe or from the module itself."""

from __future__ import annotations

import uuid
from collections.abc import Mapping

import comfy.model_management
import torch
import torch.distributed as dist
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..quantization import QuantizedWeight
from ..quantization_scheme import SCHEMES
from .comfy_quantization import with_quantized_weights
from .comfy_shared_weights import SharingPatcher, TakingOver, in_mapped_files, share_exchanged
from .comfy_travel import unpack


class Holder(nn.Module):
    """What a bare diffusion model needs around it so that the host's ModelPatcher finds it under its usual names."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    def get_dtype(self) -> torch.dtype:
        return next(self.diffusion_model.parameters()).dtype


def from_recipe(recipe: bytes) -> ModelPatcher:
    """The model that the server's loader built.

    Weights in the dtype of their file stay in its pages, which the ranks of a machine share; each rank has a copy of
    its own of weights that the loader casts or puts together, and of those of a quantized file.
    """
    function, arguments, *index = unpack(recipe, [])
    with TakingOver() as taking_over:
        found = function(*arguments)
    model = found[index[0]] if index else found
    # The host makes parameters of what it has read as well, as of a checkpoint with quantized weights.
    made = [(parameter, parameter.detach()) for parameter in model.model.parameters()]
    return SharingPatcher.of(model, in_mapped_files([*made, *taking_over.sources]))


def from_module(packed: bytes, tensors: list[Tensor], device: torch.device) -> ModelPatcher:
    """The server's module itself, over weights that all ranks of a machine share."""
    model = Holder(unpack(packed, tensors))
    patcher = ModelPatcher(model, load_device=device, offload_device=comfy.model_management.unet_offload_device())
    return SharingPatcher.of(patcher, [(parameter, parameter.detach()) for parameter in model.parameters()])


def with_quantized(model: ModelPatcher, layers: Mapping[str, Mapping], tensors: list[Tensor]) -> ModelPatcher:
    """A clone with the server's quantized weights, in memory that all ranks of a machine share."""
    clone = with_quantized_weights(model, quantized_from(layers, tensors))
    share_exchanged(clone, tensors)
    return clone


def with_patches(model: ModelPatcher, payload: Mapping) -> ModelPatcher:
    """A clone with the server's LoRAs, which are applied as the host itself applies them.

    A loader chooses dtypes for its own device, so that one of another generation may have others than the server's.
    """
    clone = model.clone()
    clone.patches = unpack(payload["patches"], payload["patch_tensors"])
    own = computing_dtype(model.model) if isinstance(model.model, BaseModel) else payload["dtype"]
    clone.force_cast_weights = payload["force_cast_weights"] or own != payload["dtype"]
    clone.patches_uuid = uuid.uuid4()
    return clone


def computing_dtype(model: BaseModel) -> str:
    """What the host casts a call's tensors to, and this model's weights are in, or are cast to."""
    return str(model.manual_cast_dtype or model.get_dtype())


def missing_bytes(model: ModelPatcher) -> list[int]:
    """Of every rank, how many bytes of the model's weights are not on its device; all of them ask together."""
    loaded = model.loaded_size()
    whole = loaded and not model.model.model_lowvram  # the host's two counts may differ then
    found = [0 if whole else max(0, model.model_size() - loaded)]
    if dist.is_initialized():
        found *= dist.get_world_size()
        dist.all_gather_object(found, found[0])
    return found


def quantized_to(weights: Mapping[str, QuantizedWeight]) -> tuple[dict[str, dict], list[Tensor]]:
    """Quantized weights as plain data, and their tensors: of each layer the data and the scale."""
    layers = {name: {"scheme": weight.scheme.name, "shape": list(weight.shape)} for name, weight in weights.items()}
    return layers, [tensor for weight in weights.values() for tensor in (weight.data, weight.scale)]


def quantized_from(layers: Mapping[str, Mapping], tensors: list[Tensor]) -> dict[str, QuantizedWeight]:
    """Undo `quantized_to`."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    return {
        name: QuantizedWeight(SCHEMES[layer["scheme"]], *pair, tuple(layer["shape"]))
        for (name, layer), pair in zip(layers.items(), pairs, strict=True)
    }
