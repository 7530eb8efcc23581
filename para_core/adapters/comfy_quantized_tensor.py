"""ComfyUI's quantized tensors with a layout of ours: how the host copies, moves, patches and saves our weights."""

from __future__ import annotations

import dataclasses
import functools

import comfy.float
import torch
from torch import Tensor

from ..quantization import QuantizedWeight, choose_scale, quantize, round_to
from ..quantization_scheme import Scheme

try:
    from comfy.quant_ops import QuantizedLayout, QuantizedTensor, register_layout_class
    from comfy_kitchen.tensor.base import BaseLayoutParams
except ImportError:  # ComfyUI 0.3
    QuantizedTensor = None

LAYOUT = "ParaAccelerateLayout"


def is_quantized(tensor: Tensor) -> bool:
    """Whether this is the host's quantized tensor, in whatever layout."""
    return QuantizedTensor is not None and isinstance(tensor, QuantizedTensor)


def quantized_tensor(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """The weight as the host's tensor, which counts as one of `dtype`; not in ComfyUI 0.3."""
    return QuantizedTensor(weight.data, LAYOUT, _layout().Params(weight.scale, dtype, weight.shape, weight.scheme))


def stochastically(weight: Tensor, scheme: Scheme, seed: int) -> QuantizedWeight:
    """Quantize what was rounded before, so that on average no small change is lost; nf4 to nearest all the same."""
    if scheme.kind == "nf4":
        return quantize(weight, scheme)
    scale = choose_scale(weight, scheme)
    if scheme.kind == "fp8":
        dtype = round_to(weight[:1, :1], scale[:1], scheme).dtype
        data = comfy.float.stochastic_rounding(weight.float() / scale, dtype, seed=seed)
    else:
        generator = torch.Generator(weight.device).manual_seed(seed)
        noise = torch.rand(weight.shape, generator=generator, device=weight.device)
        data = torch.floor(weight.float() / scale + noise).clamp(-128, 127).to(torch.int8)
    return QuantizedWeight(scheme, data, scale, (weight.shape[0], weight.shape[1]))


@functools.cache
def _layout() -> type:
    """Our layout among those of the host's quantized tensors, entered there the first time a model is quantized."""

    @dataclasses.dataclass(frozen=True)
    class Params(BaseLayoutParams):
        scheme: Scheme

    class ParaAccelerateLayout(QuantizedLayout):
        @classmethod
        def quantize(cls, tensor, scheme=None, stochastic_rounding=0, **kwargs):
            seed = stochastic_rounding
            weight = stochastically(tensor, scheme, seed) if seed else quantize(tensor, scheme)
            return weight.data, Params(weight.scale, tensor.dtype, weight.shape, scheme)

        @classmethod
        def dequantize(cls, qdata, params):
            return QuantizedWeight(params.scheme, qdata, params.scale, params.orig_shape).dequantize(params.orig_dtype)

        @classmethod
        def get_plain_tensors(cls, qtensor):
            return qtensor._qdata, qtensor._params.scale

        @classmethod
        def state_dict_tensors(cls, qdata, params):
            # The host's own format of one scale has it as a number.
            scale = params.scale if params.scheme.per_row else params.scale.reshape(())
            return {"": qdata, "_scale": scale}

        @classmethod
        def requantize_kwargs(cls, qtensor):
            return {"scheme": qtensor._params.scheme}

    ParaAccelerateLayout.Params = Params
    register_layout_class(LAYOUT, ParaAccelerateLayout)
    return ParaAccelerateLayout
