"""One scale for an activation whose tokens and rows are spread over ranks, as for all of them on one device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from .quantization_scheme import Scheme
from .sharded_operators import largest_magnitude


@contextmanager
def shared_scales(model: nn.Module) -> Iterator[None]:
    """Within the context the model's quantized linears scale by the largest magnitude on all ranks of the mesh.

    Only those of a scheme with one scale for all tokens. Each of their calls waits for all ranks once, with 4 bytes;
    they must be inside `operators_of`.
    """
    layers = [layer for layer in model.modules() if _has_one_scale(layer)]
    for layer in layers:
        layer.largest = largest_magnitude
    try:
        yield
    finally:
        for layer in layers:
            del layer.largest


def _has_one_scale(layer: nn.Module) -> bool:
    scheme = getattr(layer, "scheme", None)
    return isinstance(scheme, Scheme) and scheme.one_scale
