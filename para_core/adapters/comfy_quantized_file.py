"""ComfyUI: what a file of a quantized model holds for its quantized layers, and how it goes past the host's loader."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import comfy.ops
import comfy.utils
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..quantization import METADATA_KEY, NF4_BLOCK, QuantizedWeight
from ..quantization_scheme import SCHEMES, Scheme, scheme_for
from .comfy_quantized_linear import DESCRIPTION

# What stands in the file for one layer, to what it is called while the host builds the model around it.
PARTS = {"weight": "para_data", "weight_scale": "para_scale", DESCRIPTION: "para_description"}
LOAD_PLAIN = "load it with Load Diffusion Model"


@dataclass(frozen=True)
class LayerDescription:
    """What `QuantizedLinear.description` wrote. dtype: of the weight before it was quantized."""

    scheme: Scheme
    shape: tuple[int, int]
    dtype: torch.dtype

    @classmethod
    def of(cls, text: Tensor) -> LayerDescription | None:
        """From JSON as bytes; None where another program wrote it. Raises ValueError for an unknown scheme."""
        try:
            found = json.loads(bytes(text.tolist()))["para"]
            name, (out_features, in_features), dtype = found["scheme"], found["shape"], getattr(torch, found["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        if name not in SCHEMES:
            raise ValueError(f'scheme "{name}" is not known here; update Para Accelerate')
        return cls(SCHEMES[name], (out_features, in_features), dtype)

    def weight(self, data: Tensor, scale: Tensor) -> QuantizedWeight:
        """Copies, since the file may be written again while it is mapped."""
        # The host's format of one scale has it as a number.
        scale = scale if self.scheme.per_row else scale.reshape(1, 1)
        return QuantizedWeight(self.scheme, data.clone(), scale.clone(), self.shape)

    def fits(self, data: Tensor, scale: Tensor) -> bool:
        """Whether these can be the parts of a layer of this shape."""
        out_features, in_features = self.shape
        if self.scheme.kind == "nf4":
            return data.numel() * 2 == out_features * in_features == scale.numel() * NF4_BLOCK
        return data.shape == self.shape and scale.numel() == (out_features if self.scheme.per_row else 1)


class FileLinear(comfy.ops.manual_cast.Linear):
    """The host's linear, without memory before it gets the tensors of the file. stored: a quantized weight in there."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self.stored: QuantizedWeight | None = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FileLinear:
        # ComfyUI 0.3 moves the model before it loads the weights.
        return self if self.weight.is_meta else super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        data, scale, description = (state_dict.pop(prefix + part, None) for part in PARTS.values())
        if data is not None:
            self.stored = LayerDescription.of(description).weight(data, scale)
        for name, parameter in self._parameters.items():
            found = state_dict.pop(prefix + name, None)
            if parameter is not None and found is not None:
                # A copy: the file may be written again while it is mapped.
                self._parameters[name] = nn.Parameter(found.to(parameter.dtype, copy=True), requires_grad=False)


class FileOperations(comfy.ops.manual_cast):
    Linear = FileLinear


def read_quantized_file(file: str, device: torch.device) -> tuple[dict[str, Tensor], torch.dtype]:
    """All tensors of the file, those of quantized layers aside under the names of `PARTS`, and the model's dtype.

    In the place of a quantized weight is one of the same shape without memory: the host knows models by their shapes.
    Raises ValueError for a file that is damaged or of another kind, and for a scheme that `device` cannot run.
    """
    name = Path(file).name
    tensors, metadata = _read(file, name)
    layers = [key.removesuffix(f".{DESCRIPTION}") for key in tensors if key.endswith(f".{DESCRIPTION}")]
    if not layers and METADATA_KEY in (metadata or {}):
        raise ValueError(f"{name} holds only the quantized layers of a model; choose a file of the whole model")
    if not layers:
        raise ValueError(f"{name} holds no quantized layers; {LOAD_PLAIN}")
    descriptions = [_set_aside(tensors, layer, name) for layer in layers]
    for scheme in {description.scheme.name for description in descriptions}:
        scheme_for(scheme, device)
    return tensors, descriptions[0].dtype


def _set_aside(tensors: dict[str, Tensor], layer: str, name: str) -> LayerDescription:
    """Rename the parts of one layer in `tensors`."""
    description = LayerDescription.of(tensors[f"{layer}.{DESCRIPTION}"])
    if description is None:
        raise ValueError(f"{name} was quantized by another program; {LOAD_PLAIN}")
    parts = {part: tensors.pop(f"{layer}.{part}", None) for part in PARTS}
    data, scale = parts["weight"], parts["weight_scale"]
    if data is None or scale is None or not description.fits(data, scale):
        raise ValueError(f"{name} is damaged: {layer} is not complete; save the model anew, or choose another file")
    tensors |= {f"{layer}.{PARTS[part]}": tensor for part, tensor in parts.items()}
    tensors[f"{layer}.weight"] = torch.empty(description.shape, dtype=description.dtype, device="meta")
    return description


def _read(file: str, name: str) -> tuple[dict[str, Tensor], dict[str, str] | None]:
    if not file.lower().endswith((".safetensors", ".sft")):
        raise ValueError(f"{name} is no safetensors file, as quantized models are; {LOAD_PLAIN}")
    try:
        return comfy.utils.load_torch_file(file, return_metadata=True)
    except (SafetensorError, ValueError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"{name} cannot be read ({reason}); save the model anew, or choose another file") from error
