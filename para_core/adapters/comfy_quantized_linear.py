"""A linear with a quantized weight that lives in ComfyUI: moved, offloaded, patched by LoRAs and saved by the host."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping

import comfy.ops
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..quantization import QuantizedWeight, choose_scale, quantize, round_to
from .comfy_quantized_tensor import QuantizedTensor, is_quantized, quantized_tensor

# Formats that ComfyUI's own loader reads; the others are ours. (kind, per_row) to name.
HOST_FORMATS = {("fp8", False): "float8_e4m3fn", ("int8", True): "int8_tensorwise"}
DESCRIPTION = "comfy_quant"  # the host's name for what it saves beside a quantized weight


@dataclasses.dataclass(frozen=True)
class FloatTensor:
    """A parameter of an original layer as it is without any clone's LoRA.

    backup, hook_backup: where the host keeps what it has merged a LoRA into; all clones of a model share them.
    """

    layer: nn.Module
    name: str
    key: str
    backup: Mapping
    hook_backup: Mapping

    @classmethod
    def of(cls, patcher: ModelPatcher, path: str, name: str) -> FloatTensor:
        """Of the layer at `path`, whichever clone is loaded."""
        return cls(patcher.get_model_object(path), name, f"{path}.{name}", patcher.backup, patcher.hook_backup)

    def __call__(self) -> Tensor | None:
        current = getattr(self.layer, self.name)
        for kept in (self.hook_backup.get(self.key, (None,))[0], getattr(self.backup.get(self.key), "weight", None)):
            # The backup is the quantized layer's own while that one is in the model; then the original has no LoRA.
            if kept is not None and kept.dtype == current.dtype and not is_quantized(kept):
                return kept
        return current


class QuantizedLinear(nn.Module, comfy.ops.CastWeightBiasOp):
    """Stands in for one of the host's linears.

    source: the weight before, while it lasts; LoRAs are added to that one, so that the result is rounded once. None
    where only the quantized weight is left. dtype: of the weight before.
    """

    largest: Callable[[Tensor], Tensor] | None = None  # `shared_scales` sets it where x is a part of an activation

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None, source: FloatTensor | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme, self.dtype = weight.scheme, dtype
        self.source = source
        self.weight = _parameter(self._stored(weight))
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        comfy.ops.run_every_op()
        # Whatever this rank has offloaded: all ranks must ask.
        largest = None if self.largest is None else self.largest(x)
        cast = {"dtype": self.weight.dtype, "device": x.device, "bias_dtype": x.dtype, "compute_dtype": x.dtype}
        with comfy.ops.CastBiasWeightContext(self, **cast, offloadable=True, want_requant=True) as (weight, bias):
            if is_quantized(weight):
                return self._quantized(weight).linear(x, bias, largest)
            # Offloaded with a LoRA on it: the host has added that to the dequantized weight.
            return nn.functional.linear(x, weight.to(x.dtype), bias)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """What the host adds LoRAs to; on the device and in the dtype of `weight`."""
        if self.source is None:
            return self._quantized(weight).dequantize(weight.dtype) if is_quantized(weight) else weight
        return self.source().to(weight.device, weight.dtype, copy=True)

    def set_weight(
        self,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs,
    ) -> Tensor | None:
        """Quantize what the host has patched."""
        if inplace_update:
            raise ValueError(
                "a LoRA hook (a scheduled LoRA) cannot change a quantized weight while sampling; use Load LoRA, or "
                "connect the hook's model without FP8 Quantize"
            )
        stored = self._stored(quantize(weight, self.scheme))
        if return_weight:
            return stored
        self.weight = _parameter(stored)
        return None

    def quantized_weight(self, weight: Tensor | None = None) -> QuantizedWeight:
        """The weight as it is now, LoRAs included; or as the host has kept it."""
        return self._quantized(self.weight if weight is None else weight)

    def _stored(self, weight: QuantizedWeight) -> Tensor:
        return quantized_tensor(weight, self.dtype)

    def _quantized(self, weight: Tensor) -> QuantizedWeight:
        return QuantizedWeight(self.scheme, weight._qdata, weight._params.scale, tuple(weight._params.orig_shape))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        # torch's own swaps the data behind the parameter, which a tensor in two parts does not have.
        for name, parameter in self._parameters.items():
            if parameter is not None:
                self._parameters[name] = _parameter(fn(parameter))
        return self

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        destination |= self.weight.state_dict(f"{prefix}weight")
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()
        destination[f"{prefix}{DESCRIPTION}"] = self.description()

    def description(self) -> Tensor:
        """JSON as bytes: the format by which the host's loader knows the weight, and what ours has to know besides."""
        name = HOST_FORMATS.get((self.scheme.kind, self.scheme.per_row), f"para_{self.scheme.kind}")
        shape, dtype = [self.out_features, self.in_features], str(self.dtype).removeprefix("torch.")
        text = json.dumps({"format": name, "para": {"scheme": self.scheme.name, "shape": shape, "dtype": dtype}})
        return torch.tensor(list(text.encode()), dtype=torch.uint8)


class RawQuantizedLinear(QuantizedLinear):
    """For ComfyUI 0.3, which knows no quantized tensors: the host handles the weight's data, this class the scale.

    A weight that the host offloads while a LoRA is on it keeps the scale it had; what is larger saturates.
    """

    def __init__(self, weight: QuantizedWeight, *args, **kwargs) -> None:
        super().__init__(weight, *args, **kwargs)
        self.weight_scale = _parameter(weight.scale)
        self._original_scale = weight.scale

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        # The host takes a LoRA back by putting the former weight here; it does not know that a scale belongs to it.
        if name == "weight" and "_original_scale" in self.__dict__:
            self.weight_scale = _parameter(self._original_scale.to(self.weight_scale.device))

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        largest = None if self.largest is None else self.largest(x)
        weight, bias = comfy.ops.cast_bias_weight(self, dtype=self.weight.dtype, device=x.device, bias_dtype=x.dtype)
        return self._quantized(weight).linear(x, bias, largest)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs) -> Tensor:
        """What the host adds LoRAs to; here it gives the numbers as they are stored."""
        if self.source is None:
            return weight * self._original_scale.to(weight.device, weight.dtype)
        return super().convert_weight(weight)

    def set_weight(self, weight: Tensor, *args, return_weight: bool = False, **kwargs) -> Tensor | None:
        """Quantize what the host has patched, with a new scale where the result stays in this layer."""
        if return_weight:
            return round_to(weight, self.weight_scale.to(weight.device), self.scheme)
        super().set_weight(weight, *args, **kwargs)
        self.weight_scale = _parameter(choose_scale(weight, self.scheme))
        return None

    def quantized_weight(self, weight: Tensor | None = None) -> QuantizedWeight:
        if weight is None:
            return self._quantized(self.weight)
        return QuantizedWeight(self.scheme, weight, self._original_scale, (self.out_features, self.in_features))

    def _stored(self, weight: QuantizedWeight) -> Tensor:
        return weight.data

    def _quantized(self, weight: Tensor) -> QuantizedWeight:
        scale = self.weight_scale.to(weight.device)
        return QuantizedWeight(self.scheme, weight, scale, (self.out_features, self.in_features))

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        nn.Module._save_to_state_dict(self, destination, prefix, keep_vars)
        destination[f"{prefix}{DESCRIPTION}"] = self.description()


def quantized_linear(*args) -> QuantizedLinear:
    """The linear for this version of the host; arguments as `QuantizedLinear`'s.

    Raises ValueError for a scheme that the version cannot hold.
    """
    if QuantizedTensor is not None:
        return QuantizedLinear(*args)
    if args[0].scheme.kind == "nf4":
        raise ValueError("nf4 needs ComfyUI 0.33 or newer; update ComfyUI, or choose int8_weight_only")
    return RawQuantizedLinear(*args)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor.detach(), requires_grad=False)
