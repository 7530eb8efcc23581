"""The schemes of quantized weights: what each one stores, which devices run it, and which package it needs.

Besides `quantization`, the only file that knows torchao and bitsandbytes; both are imported where they are needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

import torch

INT8_ROUNDING = 0.3  # relative L2 of a row, over that of float8
FP8_CAPABILITY = (8, 9)  # of NVIDIA GPUs


@dataclass(frozen=True)
class Scheme:
    """How weights are stored, and whether activations are quantized too, with a scale computed at run time.

    kind: fp8, int8 or nf4. per_row: a scale for each row (of the activation: each token), not one for all.
    """

    name: str
    kind: str
    per_row: bool
    dynamic: bool = False

    @property
    def one_scale(self) -> bool:
        """Whether an activation has a single scale, which all of its tokens have a part in."""
        return self.dynamic and not self.per_row

    @property
    def rounding(self) -> float:
        """How coarsely activations are rounded, 1 as float8 does; measured on normally distributed ones."""
        return (1.0 if self.kind == "fp8" else INT8_ROUNDING) if self.dynamic else 0.0


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("fp8_dynamic_per_tensor", "fp8", per_row=False, dynamic=True),
        Scheme("fp8_dynamic_per_row", "fp8", per_row=True, dynamic=True),
        Scheme("fp8_weight_only", "fp8", per_row=True),
        Scheme("int8_dynamic_per_row", "int8", per_row=True, dynamic=True),
        Scheme("int8_weight_only", "int8", per_row=True),
        Scheme("nf4", "nf4", per_row=True),
    )
}
WEIGHT_ONLY = tuple(name for name, scheme in SCHEMES.items() if not scheme.dynamic)


def rounding_of(layers: Iterable[object]) -> float:
    """`Scheme.rounding` of the coarsest of these layers; 0 where none of them is one of our quantized linears."""
    schemes = (getattr(layer, "scheme", None) for layer in layers)
    return max((scheme.rounding for scheme in schemes if isinstance(scheme, Scheme)), default=0.0)


def scheme_for(name: str, device: torch.device, *, weight_only: bool = False) -> Scheme:
    """The scheme of that name, `auto` by device.

    Raises ValueError for an unknown scheme, for one that the device cannot run, or whose package is missing; each says
    what to choose instead.
    """
    allowed = WEIGHT_ONLY if weight_only else tuple(SCHEMES)
    if name == "auto":
        name = _automatic(device, weight_only)
    if name not in allowed:
        raise ValueError(f'scheme "{name}" is not available here; choose one of: auto, {", ".join(allowed)}')
    scheme = SCHEMES[name]
    lacks = _lacks(scheme, device)
    if lacks is not None:
        instead = next(other for other in ("int8_dynamic_per_row", "int8_weight_only") if _fits(other, device))
        compiled = ", which also work with Compile Model" if device.type == "cuda" else ""
        raise ValueError(
            f"{name} cannot run on {_device_name(device)}: {lacks}. Choose {instead} or auto instead{compiled}."
        )
    if scheme.kind == "nf4":
        bitsandbytes_functional()
    elif has_kernels(scheme, device):
        torchao_for(scheme)
    return scheme


def has_kernels(scheme: Scheme, device: torch.device) -> bool:
    """Whether activations in this scheme multiply in hardware there; else the reference computes the same numbers."""
    return scheme.dynamic and device.type != "cpu" and _lacks(scheme, device) is None


def compiled_lacks(scheme: Scheme, device: torch.device) -> str | None:
    """Why this scheme does not run there in compiled code, and what does; None where it runs, or is no matter of it."""
    if scheme.kind != "fp8" or device.type != "cuda" or torch.version.hip:
        return None
    capability = torch.cuda.get_device_capability(device)
    if capability >= FP8_CAPABILITY:
        return None
    instead = (
        "int8_dynamic_per_row or int8_weight_only" if _fits("int8_dynamic_per_row", device) else "int8_weight_only"
    )
    return (
        f"compiled code cannot convert float8 on compute capability {capability[0]}.{capability[1]}; "
        f"with Compile Model choose {instead}"
    )


def _automatic(device: torch.device, weight_only: bool) -> str:
    preferred = ("fp8_dynamic_per_row", "fp8_dynamic_per_tensor", "int8_dynamic_per_row", "int8_weight_only")
    # The reference on the CPU is no faster, so there the most exact way to half the memory.
    usable = preferred[3:] if weight_only or device.type == "cpu" else preferred
    return next(name for name in usable if _fits(name, device))


def _fits(name: str, device: torch.device) -> bool:
    return _lacks(SCHEMES[name], device) is None


def _lacks(scheme: Scheme, device: torch.device) -> str | None:
    """What the device lacks for this scheme."""
    if scheme.kind == "fp8" and device.type == "mps":
        return "mps has no float8"
    if not scheme.dynamic or device.type in ("cpu", "xpu"):
        return None
    if device.type != "cuda":
        return f"{device.type} multiplies neither float8 nor int8"
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        fits = scheme.kind != "fp8" or arch in ("gfx942", "gfx950")
        return None if fits else f"its architecture is {arch}, and float8 products need MI300 or newer"
    if sys.platform == "win32" and scheme.kind == "fp8" and scheme.per_row:
        return "torch for Windows has no float8 product per row"
    needed = FP8_CAPABILITY if scheme.kind == "fp8" else (7, 5)
    capability = torch.cuda.get_device_capability(device)
    if capability >= needed:
        return None
    return f"its compute capability is {capability[0]}.{capability[1]}, below {needed[0]}.{needed[1]}"


def _device_name(device: torch.device) -> str:
    return f"{torch.cuda.get_device_name(device)} ({device})" if device.type == "cuda" else str(device)


def torchao_for(scheme: Scheme) -> ModuleType:
    """torchao's tensors and kernels. Raises ValueError where it is not installed."""
    try:
        import torchao.quantization
    except ImportError:
        raise ValueError(
            f"{scheme.name} needs torchao, which is missing; install it with: pip install torchao, or choose one of: "
            f"{', '.join(WEIGHT_ONLY)}"
        ) from None
    return torchao.quantization


def bitsandbytes_functional() -> ModuleType:
    """bitsandbytes' conversions. Raises ValueError where it is not installed."""
    try:
        import bitsandbytes.functional
    except ImportError:
        raise ValueError(
            "nf4 needs bitsandbytes, which is missing; install it with: pip install bitsandbytes, or choose "
            "int8_weight_only"
        ) from None
    return bitsandbytes.functional
