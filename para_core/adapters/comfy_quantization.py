"""ComfyUI: quantizes the linears of a MODEL or of a CLIP's text encoders, on a clone."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from functools import partial

import comfy.utils
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP
from torch import nn

from ..families import family_of
from ..quantization import QuantizedWeight, from_state_dict, quantize, to_state_dict
from ..quantization_plan import Selection, choose_layers, family_layers, listed_layers, weight_obstacle
from ..quantization_report import QuantizationReport, Tally
from ..quantization_scheme import Scheme, scheme_for
from .comfy_quantized_file import FileLinear
from .comfy_quantized_linear import FloatTensor, QuantizedLinear, quantized_linear
from .comfy_quantized_tensor import is_quantized

logger = logging.getLogger(__name__)

DIFFUSION_MODEL = "diffusion_model."
PLAIN_LINEARS = ("comfy.ops", "torch.nn.modules.linear")
DEFAULT = Selection()
# The one attachment of ours: the reports, on a quantized MODEL and everything cloned from it.
KEY = "para_accelerate_quantization"


def apply_quantization(
    model: ModelPatcher, scheme: str, selection: Selection = DEFAULT
) -> tuple[ModelPatcher, QuantizationReport]:
    """A clone of `model` with quantized linears, and what was done; `model` and its clones are not changed.

    Takes the time to round every weight once, on the device that samples. Raises ValueError for a scheme that this
    device cannot run, and for a model that no family serves unless `selection` includes layers.
    """
    diffusion_model = model.model.diffusion_model
    try:
        defaults = family_layers(diffusion_model, family_of(diffusion_model))
    except ValueError:
        if not selection.include:
            raise
        defaults = {}
    chosen, left = choose_layers(diffusion_model, defaults, selection, partial(_obstacle, model, DIFFUSION_MODEL))
    found = scheme_for(scheme, model.load_device)
    return _quantize_layers(model.clone(), found, {name: DIFFUSION_MODEL + name for name in chosen}, left)


def apply_clip_quantization(clip: CLIP, scheme: str, selection: Selection = DEFAULT) -> tuple[CLIP, QuantizationReport]:
    """A clone of `clip` whose text encoders hold quantized weights; only weight-only schemes.

    Raises ValueError as `apply_quantization`.
    """
    encoders = clip.patcher.model
    chosen, left = choose_layers(encoders, listed_layers(encoders), selection, partial(_obstacle, clip.patcher, ""))
    found = scheme_for(scheme, clip.patcher.load_device, weight_only=True)
    clone = clip.clone()
    clone.patcher, report = _quantize_layers(clone.patcher, found, {name: name for name in chosen}, left)
    return clone, report


def quantization_reports(model: ModelPatcher) -> tuple[QuantizationReport, ...]:
    """What was done to this MODEL, by each node in turn; empty where it is not quantized."""
    return model.get_attachment(KEY) or ()


def quantized_layers(model: ModelPatcher) -> dict[str, QuantizedLinear]:
    """The layers that stand in for the model's own, by path; clones share them."""
    return {path: layer for path, layer in model.object_patches.items() if isinstance(layer, QuantizedLinear)}


def quantized_weights(model: ModelPatcher) -> dict[str, QuantizedWeight]:
    """The quantized weights of a MODEL by layer name, without LoRAs; for a file, or for other processes."""
    found: dict[str, QuantizedWeight] = {}
    for path, layer in quantized_layers(model).items():
        backup = model.backup.get(f"{path}.weight")
        # Not pristine in the layer while a LoRA is merged; then the host has kept it.
        merged = backup is not None and comfy.utils.get_attr(model.model, path) is layer
        found[path.removeprefix(DIFFUSION_MODEL)] = (
            layer.quantized_weight() if not merged else layer.quantized_weight(backup.weight)
        )
    return found


def with_quantized_weights(model: ModelPatcher, weights: Mapping[str, QuantizedWeight]) -> ModelPatcher:
    """A clone of `model` that uses weights made elsewhere by `quantized_weights`.

    Raises ValueError if the model has no such layer, or one of another shape.
    """
    clone = model.clone()
    saved = 0
    for name, weight in weights.items():
        path = DIFFUSION_MODEL + name
        try:
            layer = clone.get_model_object(path)
        except AttributeError:
            raise ValueError(f"the model has no layer {name}; the quantized weights are another model's") from None
        if (layer.out_features, layer.in_features) != weight.shape:
            came, wanted = weight.shape, (layer.out_features, layer.in_features)
            raise ValueError(f"{name} is {wanted} in this model and {came} in the file; they do not belong together")
        saved += _replace(clone, path, weight)
    return _resized(clone, saved)


def save_quantized_weights(model: ModelPatcher, file: str) -> None:
    """Write the quantized weights of a MODEL, without LoRAs and without its other layers, to a safetensors file.

    Raises ValueError for a MODEL without any.
    """
    weights = quantized_weights(model)
    if not weights:
        raise ValueError("the MODEL has no quantized layers to save; connect it from behind FP8 Quantize")
    tensors, metadata = to_state_dict(weights)
    comfy.utils.save_torch_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)


def load_quantized_weights(model: ModelPatcher, file: str) -> ModelPatcher:
    """A clone of `model` with the weights that `save_quantized_weights` wrote, bit by bit.

    Raises ValueError for another kind of file, and for one of another model.
    """
    tensors, metadata = comfy.utils.load_torch_file(file, safe_load=True, return_metadata=True)
    return with_quantized_weights(model, from_state_dict(tensors, metadata or {}))


def _quantize_layers(
    clone: ModelPatcher, scheme: Scheme, paths: Mapping[str, str], left: dict[str, str]
) -> tuple[ModelPatcher, QuantizationReport]:
    tally = Tally(scheme, left)
    saved = 0
    for name, path in paths.items():
        weight = FloatTensor.of(clone, path, "weight")().to(clone.load_device)
        quantized = quantize(weight, scheme)
        tally.add(name, weight, quantized)
        saved += _replace(clone, path, quantized)
    report = tally.report(clone.load_device)
    logger.info(report.summary())
    clone.set_attachments(KEY, (*quantization_reports(clone), report))
    return _resized(clone, saved), report


def _replace(clone: ModelPatcher, path: str, weight: QuantizedWeight) -> int:
    """Put a quantized linear in the place of the one at `path`; returns the bytes saved."""
    source = FloatTensor.of(clone, path, "weight")
    weight = weight.to(clone.offload_device)
    bias, original = FloatTensor.of(clone, path, "bias")(), source()
    clone.add_object_patch(path, quantized_linear(weight, bias, source, original.dtype))
    return original.nbytes - weight.nbytes


def _resized(clone: ModelPatcher, saved: int) -> ModelPatcher:
    clone.size = clone.model_size() - saved
    # Else the host takes the clone for its original and does not move the new layers.
    clone.patches_uuid = uuid.uuid4()
    return clone


def _obstacle(patcher: ModelPatcher, prefix: str, name: str, _: nn.Module) -> str | None:
    """What keeps this layer from being quantized, or None."""
    layer = patcher.get_model_object(prefix + name)
    if isinstance(layer, QuantizedLinear):
        return "already quantized (by this node)"
    if is_quantized(layer.weight):
        return f"already quantized ({layer.weight._layout_cls})"
    obstacle = weight_obstacle(layer.weight)
    if obstacle is None and type(layer).__module__ not in PLAIN_LINEARS and type(layer) is not FileLinear:
        return f"not a plain linear ({type(layer).__name__})"
    return obstacle
