"""Quantized linear weights: their scales and rounding, and the product with an activation.

Scales and rounding are torchao's. Its tensors and kernels run where the device has them; elsewhere a reference
computes the same numbers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .quantization_scheme import SCHEMES, Scheme, bitsandbytes_functional, has_kernels, torchao_for

NF4_BLOCK = 64  # weights that share one scale
SMALLEST = 1e-12  # of the largest magnitudes: a row of zeros would divide by zero
METADATA_KEY = "para_quantization"


@dataclass(frozen=True)
class QuantizedWeight:
    """The weight of one linear.

    data: (out, in) in the scheme's dtype; of nf4 two weights a byte. scale: float32, (out, 1), (1, 1), or of nf4 one a
    block. shape: (out, in).
    """

    scheme: Scheme
    data: Tensor
    scale: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same weight there."""
        return QuantizedWeight(self.scheme, self.data.to(device), self.scale.to(device), self.shape)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight as a tensor that multiplies, (out, in)."""
        if self.scheme.kind == "nf4":
            return _dequantize_nf4(self).to(dtype)
        return (self.data.to(torch.float32) * self.scale).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None = None, largest: Tensor | None = None) -> Tensor:
        """x @ weight.T + bias in the dtype of x; all on one device. x: (..., in).

        largest: of a scheme with one scale, the magnitude to scale by where x is a part of an activation; ().
        """
        # A stream may be without tokens (LTX-AV without sound), of which there is no largest magnitude.
        if not self.scheme.dynamic or not x.numel():
            return torch.nn.functional.linear(x, self.dequantize(x.dtype), bias)
        if has_kernels(self.scheme, x.device):
            return kernel_linear(self, x, bias, largest)
        return reference_linear(self, x, bias, largest)


def quantize(weight: Tensor, scheme: Scheme) -> QuantizedWeight:
    """Round a float weight of shape (out, in), on its own device. Raises ValueError if nf4 lacks bitsandbytes."""
    shape = (weight.shape[0], weight.shape[1])
    if scheme.kind == "nf4":
        data, state = bitsandbytes_functional().quantize_4bit(
            weight.contiguous(), blocksize=NF4_BLOCK, quant_type="nf4"
        )
        return QuantizedWeight(scheme, data, state.absmax, shape)
    scale = choose_scale(weight, scheme)
    return QuantizedWeight(scheme, round_to(weight, scale, scheme), scale, shape)


def choose_scale(x: Tensor, scheme: Scheme, largest: Tensor | None = None) -> Tensor:
    """The largest magnitude, of each row or of all, over the largest number of the dtype; float32, (rows or 1, 1).

    largest: that of all where x is only a part.
    Source: pytorch/ao 0.18, quant_primitives.py; computed there in the dtype of x, so here too. In float16 that would
    underflow. The lower bounds keep rows of zeros from dividing by zero.
    """
    x = x.float() if x.dtype == torch.float16 else x
    if scheme.kind == "int8":
        # Symmetric over -128 to 127: half the number of steps.
        largest = torch.maximum(-x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0))
        return (largest / 127.5).float().clamp(min=torch.finfo(torch.float32).eps)
    if scheme.per_row:
        largest = x.abs().amax(-1, keepdim=True)
    else:
        largest = (x.abs().amax() if largest is None else largest.to(x.dtype)).reshape(1, 1)
    return (largest.clamp(min=SMALLEST) / torch.finfo(_fp8(x.device)).max).float()


def round_to(x: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """x / scale, saturated and rounded to nearest in the scheme's dtype."""
    if scheme.kind == "int8":
        return torch.clamp(torch.round(x.float() * (1.0 / scale)), -128, 127).to(torch.int8)
    dtype = _fp8(x.device)
    largest = torch.finfo(dtype).max
    return (x.float() / scale).clamp(-largest, largest).to(dtype)


def _fp8(device: torch.device) -> torch.dtype:
    if device.type == "cuda" and torch.version.hip:
        if torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx942"):
            return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn


def reference_linear(weight: QuantizedWeight, x: Tensor, bias: Tensor | None, largest: Tensor | None = None) -> Tensor:
    """What the kernels compute: both sides quantized, products accumulated in float32 (int8: exactly)."""
    rows = x.reshape(-1, x.shape[-1])
    scale = choose_scale(rows, weight.scheme, largest)
    data = round_to(rows, scale, weight.scheme)
    if weight.scheme.kind == "int8":
        product = torch._int_mm(data, weight.data.t()).float()
    else:
        product = data.float() @ weight.data.float().t()
    product = product * scale * weight.scale.t()
    if bias is not None:
        product = product + bias.float()
    return product.to(x.dtype).reshape(*x.shape[:-1], -1)


def kernel_linear(weight: QuantizedWeight, x: Tensor, bias: Tensor | None, largest: Tensor | None = None) -> Tensor:
    """torchao's quantization of the activation and its product, on a device that has both."""
    # torch's per-row float8 product only gives bfloat16; int8's whole numbers exceed float16 before they are scaled.
    if weight.scheme.kind == "int8":
        dtype = torch.float32 if x.dtype == torch.float16 else x.dtype
    else:
        dtype = torch.bfloat16 if weight.scheme.per_row else x.dtype
    bias = None if bias is None else bias.to(dtype)
    given, tensor = x.to(dtype), _torchao_tensor(weight, dtype, quantizes=largest is None)
    if largest is not None:
        given = _torchao_activation(given, weight, largest)
    return torch.nn.functional.linear(given, tensor, bias).to(x.dtype)


def _torchao_tensor(weight: QuantizedWeight, dtype: torch.dtype, *, quantizes: bool = True) -> Tensor:
    """quantizes: activations that it is multiplied with, which are not yet (float8 only)."""
    ao = torchao_for(weight.scheme)
    granularity = ao.PerRow() if weight.scheme.per_row else ao.PerTensor()
    block_size = [1 if weight.scheme.per_row else weight.shape[0], weight.shape[1]]
    if weight.scheme.kind == "int8":
        from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

        activation = QuantizeTensorToInt8Kwargs(granularity)
        return ao.Int8Tensor(weight.data, weight.scale, block_size, dtype, act_quant_kwargs=activation)
    from torchao.quantization.quantize_.common import KernelPreference
    from torchao.quantization.quantize_.workflows.float8.float8_tensor import QuantizeTensorToFloat8Kwargs

    mm_config = ao.Float8MMConfig(use_fast_accum=True)
    kernels = KernelPreference.TORCH  # torch's own, whatever else is installed
    activation = QuantizeTensorToFloat8Kwargs(
        weight.data.dtype, granularity, mm_config, hp_value_lb=SMALLEST, kernel_preference=kernels
    )
    settings = {"mm_config": mm_config, "kernel_preference": kernels, "dtype": dtype}
    return ao.Float8Tensor(
        weight.data, weight.scale, block_size, act_quant_kwargs=activation if quantizes else None, **settings
    )


def _torchao_activation(x: Tensor, weight: QuantizedWeight, largest: Tensor) -> Tensor:
    """Quantized as torchao would quantize the whole of which x is a part: one number has the scale of the largest."""
    ao = torchao_for(weight.scheme)
    from torchao.quantization.quantize_.common import KernelPreference

    one, kernels = largest.to(x.dtype).reshape((1,) * x.ndim), KernelPreference.TORCH
    scale = ao.Float8Tensor.from_hp(
        one, weight.data.dtype, ao.PerTensor(), hp_value_lb=SMALLEST, kernel_preference=kernels
    ).scale
    data = round_to(x, scale, weight.scheme)
    return ao.Float8Tensor(data, scale, list(x.shape), kernel_preference=kernels, dtype=x.dtype)


def _dequantize_nf4(weight: QuantizedWeight) -> Tensor:
    bnb = bitsandbytes_functional()
    code = bnb.get_4bit_type("nf4", device=weight.data.device, blocksize=NF4_BLOCK)
    state = bnb.QuantState(
        weight.scale, torch.Size(weight.shape), code, NF4_BLOCK, quant_type="nf4", dtype=torch.float32
    )
    return bnb.dequantize_4bit(weight.data, state)


def to_state_dict(weights: Mapping[str, QuantizedWeight]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Flat tensors and safetensors metadata, from which `from_state_dict` makes the same weights, bit by bit."""
    tensors = {f"{name}.weight": weight.data for name, weight in weights.items()}
    tensors |= {f"{name}.weight_scale": weight.scale for name, weight in weights.items()}
    layers = {name: {"scheme": weight.scheme.name, "shape": weight.shape} for name, weight in weights.items()}
    return tensors, {METADATA_KEY: json.dumps(layers)}


def from_state_dict(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, QuantizedWeight]:
    """The weights that `to_state_dict` wrote. Raises ValueError for a file that is not of this kind."""
    if METADATA_KEY not in metadata:
        raise ValueError(f"the file carries no {METADATA_KEY} metadata; it was not written by Para Accelerate")
    return {
        name: QuantizedWeight(
            SCHEMES[layer["scheme"]], tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"], tuple(layer["shape"])
        )
        for name, layer in json.loads(metadata[METADATA_KEY]).items()
    }
