"""diffusers: quantizes the linears of a pipeline's models."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..families import family_of
from ..quantization import QuantizedWeight, quantize
from ..quantization_plan import Selection, choose_layers, family_layers, listed_layers, weight_obstacle
from ..quantization_report import QuantizationReport, Tally
from ..quantization_scheme import Scheme, scheme_for

logger = logging.getLogger(__name__)

Pipe = TypeVar("Pipe", bound=DiffusionPipeline)
DEFAULT = Selection()


class QuantizedLinear(nn.Module):
    """Stands in for an `nn.Linear`; its state dict holds the quantized weight and its scale."""

    largest: Callable[[Tensor], Tensor] | None = None  # `shared_scales` sets it where x is a part of an activation

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.scheme = weight.scheme
        self.register_buffer("weight", weight.data)
        self.register_buffer("weight_scale", weight.scale)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        largest = None if self.largest is None else self.largest(x)
        return self.quantized_weight().linear(x, self.bias, largest)

    def quantized_weight(self) -> QuantizedWeight:
        """The weight, where it is now."""
        return QuantizedWeight(self.scheme, self.weight, self.weight_scale, (self.out_features, self.in_features))

    def _apply(self, fn, recurse: bool = True):
        stored = self.weight, self.weight_scale
        super()._apply(fn, recurse)
        # A pipeline's .to(dtype) casts every floating tensor, but this one's dtype is its scheme's.
        self.weight, self.weight_scale = (
            new if new.dtype == old.dtype else old.to(new.device)
            for old, new in zip(stored, (self.weight, self.weight_scale), strict=True)
        )
        return self


def quantize_pipe(
    pipe: Pipe,
    scheme: str = "auto",
    *,
    components: Sequence[str] = ("transformer",),
    selection: Selection = DEFAULT,
) -> Pipe:
    """Exchange the large linears of the pipeline's `components` for quantized ones, and return the pipeline.

    Changes the models, which other pipelines may share. LoRAs must be fused before (`pipe.fuse_lora()`). Models that
    no family serves, such as text encoders, are quantized in all their blocks, and weight-only. Raises ValueError for
    a component that the pipeline does not have, and for a scheme that its device cannot run.
    """
    for component in components:
        model = getattr(pipe, component, None)
        if not isinstance(model, nn.Module):
            having = ", ".join(name for name, found in pipe.components.items() if isinstance(found, nn.Module))
            raise ValueError(f"{type(pipe).__name__} has no model {component}; it has: {having}")
        logger.info("%s: %s", component, quantize_model(model, scheme, selection=selection).summary())
    return pipe


def quantize_model(model: nn.Module, scheme: str = "auto", *, selection: Selection = DEFAULT) -> QuantizationReport:
    """Exchange the large linears of `model` in place. Raises ValueError as `quantize_pipe`."""
    device = next(model.parameters()).device
    try:
        defaults, weight_only = family_layers(model, family_of(model)), False
    except ValueError:
        defaults, weight_only = listed_layers(model), True
    found: Scheme = scheme_for(scheme, device, weight_only=weight_only)
    chosen, left = choose_layers(model, defaults, selection, _obstacle)
    tally = Tally(found, left)
    for name in chosen:
        layer = model.get_submodule(name)
        weight = quantize(layer.weight.detach(), found)
        tally.add(name, layer.weight, weight)
        model.set_submodule(name, QuantizedLinear(weight, layer.bias))
    return tally.report(device)


def _obstacle(_: str, layer: nn.Module) -> str | None:
    if isinstance(layer, QuantizedLinear):
        return "already quantized (by this function)"
    obstacle = weight_obstacle(layer.weight)
    if obstacle is None and type(layer) is not nn.Linear:
        return f"not a plain linear ({type(layer).__name__})"
    return obstacle
