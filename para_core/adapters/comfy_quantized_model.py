"""ComfyUI: a diffusion model from a file that holds quantized weights, which are nothing else in memory at any time."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import comfy.model_management
import comfy.sd
import comfy.utils
from comfy.model_patcher import ModelPatcher

from ..quantization_report import QuantizationReport, note
from .comfy_quantization import KEY
from .comfy_quantized_file import FileLinear, FileOperations, read_quantized_file
from .comfy_quantized_linear import QuantizedLinear, quantized_linear


def load_quantized_model(file: str, disable_dynamic: bool = False) -> ModelPatcher:
    """The MODEL that was saved behind FP8 Quantize: it samples bit for bit as that one did.

    A LoRA is added to the dequantized weights, since the original ones are gone. disable_dynamic: as of the host's own
    loaders. Raises ValueError for a file that is damaged or of another kind, and for a scheme that the device cannot
    run.
    """
    tensors, dtype = read_quantized_file(file, comfy.model_management.get_torch_device())
    options = {"custom_operations": FileOperations, "dtype": dtype}
    load, newer = comfy.sd.load_diffusion_model_state_dict, {"disable_dynamic": disable_dynamic}
    known = inspect.signature(load).parameters
    model = load(tensors, model_options=options, **{key: value for key, value in newer.items() if key in known})
    name = Path(file).name
    if model is None:
        raise ValueError(f"{name} holds a model that this ComfyUI does not know; update it, or choose another file")
    diffusion_model = model.model.diffusion_model
    layers = {path: layer for path, layer in diffusion_model.named_modules() if isinstance(layer, FileLinear)}
    for path, layer in layers.items():
        if layer.stored is not None:
            linear = quantized_linear(layer.stored, layer.bias, None, dtype)
            comfy.utils.set_attr(diffusion_model, path, linear)
    if missing := [path for path, tensor in diffusion_model.state_dict().items() if tensor.is_meta]:
        raise ValueError(f"{name} is damaged: {missing[0]} is not in it; save the model anew, or choose another file")
    model.size = 0  # the host may have counted what has been replaced; it counts anew
    model.cached_patcher_init = (load_quantized_model, (file,))
    model.set_attachments(KEY, (_report(model),))
    return model


def stored_linears(model: ModelPatcher) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized layers that came with the model's own file, by name in the diffusion model."""
    diffusion_model = model.model.diffusion_model
    # "original": where other processes run the model.
    for name, module in getattr(diffusion_model, "original", diffusion_model).named_modules():
        if isinstance(module, QuantizedLinear) and module.source is None:
            yield name, module


def _report(model: ModelPatcher) -> QuantizationReport:
    """How far the weights are from the original ones, the file does not tell."""
    layers = dict(stored_linears(model))
    weights = [layer.quantized_weight() for layer in layers.values()]
    schemes = {weight.scheme.name: weight.scheme for weight in weights}
    sizes = [weight.shape[0] * weight.shape[1] for weight in weights]
    before = sum(size * layer.dtype.itemsize for size, layer in zip(sizes, layers.values(), strict=True))
    after = sum(weight.nbytes for weight in weights)
    notes = dict.fromkeys(note(scheme, model.load_device) for scheme in schemes.values())
    numbers = (before, after, sum(sizes), None)
    return QuantizationReport(" + ".join(schemes), tuple(layers), {}, *numbers, "; ".join(filter(None, notes)))
