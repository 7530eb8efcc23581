"""Which linears of a model are quantized, which are left and why, and what that cost: bytes and error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .families import ModelFamily
from .quantization import QuantizedWeight, Scheme, has_kernels

# Kernels want multiples of 16; a smaller layer costs more in scales and rounding than it saves.
MULTIPLE_OF = 16
MIN_FEATURES = 64
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Selection:
    """Patterns over layer names (`*` and `?` as in file names), on top of what the family takes by default.

    include: layers to add. exclude: layers to leave; it outranks include.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @classmethod
    def of(cls, include: str, exclude: str) -> Selection:
        """From text with one pattern a line, or several between commas."""
        return cls(*(tuple(text.replace(",", " ").split()) for text in (include, exclude)))


@dataclass(frozen=True)
class QuantizationReport:
    """What was done to one model.

    quantized: layer names. left: name to reason. bytes_before, bytes_after: of the quantized layers' weights.
    weight_error: relative L2 of all quantized weights. note: what to know about this device; may be empty.
    """

    scheme: str
    quantized: tuple[str, ...]
    left: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    weight_error: float
    note: str = ""

    def summary(self) -> str:
        """One line with the numbers."""
        before, after = self.bytes_before, self.bytes_after
        share = f" ({after / before:.2f})" if before else ""
        reasons = Counter(self.left.values()).most_common()
        left = f"; left {len(self.left)}: " + ", ".join(f"{count} {why}" for why, count in reasons) if reasons else ""
        return (
            f"{self.scheme}: {len(self.quantized)} layers, {_size(before)} -> {_size(after)}{share}, "
            f"weight error {self.weight_error:.2%}{left}{'; ' + self.note if self.note else ''}"
        )


@dataclass
class Tally:
    """Adds up a report while the layers of a model are quantized one by one."""

    scheme: Scheme
    left: dict[str, str]
    quantized: list[str] = field(default_factory=list)
    bytes_before: int = 0
    bytes_after: int = 0
    _error: float = 0.0
    _norm: float = 0.0

    def add(self, name: str, weight: Tensor, quantized: QuantizedWeight) -> None:
        """Waits for the device."""
        reference = weight.detach().float()
        self.quantized.append(name)
        self.bytes_before += weight.nbytes
        self.bytes_after += quantized.nbytes
        self._error += float((quantized.dequantize(torch.float32) - reference).square().sum())
        self._norm += float(reference.square().sum())

    def report(self, device: torch.device) -> QuantizationReport:
        """device: on which the model will run."""
        error = (self._error / self._norm) ** 0.5 if self._norm else 0.0
        numbers = (self.bytes_before, self.bytes_after, error)
        return QuantizationReport(
            self.scheme.name, tuple(self.quantized), self.left, *numbers, note(self.scheme, device)
        )


def note(scheme: Scheme, device: torch.device) -> str:
    """What a person should know about this scheme on this device; empty where nothing is amiss."""
    if scheme.dynamic and not has_kernels(scheme, device):
        return f"{device.type} has no kernels for it: the reference computes the same numbers and is not faster"
    if not scheme.dynamic:
        return "weight only: less memory, not faster"
    return ""


def family_layers(model: nn.Module, family: ModelFamily) -> dict[str, str | None]:
    """Every linear-like layer inside the family's blocks, to the reason why it stays as it is, or None."""
    blocks = {block for stack in family.stacks for block in stack.blocks_in(model)}
    prefixes = tuple(f"{name}." for name, module in model.named_modules() if module in blocks)
    found: dict[str, str | None] = {}
    for name, module in model.named_modules():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if prefix is not None and is_linear(module):
            keeps = any(fnmatchcase(name.removeprefix(prefix).lower(), pattern) for pattern in family.unquantized)
            found[name] = "modulation, norms, embedders" if keeps else None
    return found


def listed_layers(model: nn.Module) -> dict[str, str | None]:
    """As `family_layers` for a model without a family: the linears of everything that stands in a list of blocks."""
    return {
        name: None
        for name, module in model.named_modules()
        if is_linear(module) and any(part.isdigit() for part in name.split("."))
    }


def is_linear(module: nn.Module) -> bool:
    """A linear of whatever library: it maps in_features to out_features."""
    return hasattr(module, "in_features") and hasattr(module, "out_features") and hasattr(module, "weight")


def choose_layers(
    model: nn.Module,
    defaults: Mapping[str, str | None],
    selection: Selection,
    obstacle: Callable[[str, nn.Module], str | None],
) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to quantize, in the model's order, and of the others with the reason.

    obstacle: (name, layer) to what keeps a layer from being quantized at all, or None.
    Raises ValueError for a pattern that matches no layer, or if nothing is left to quantize.
    """
    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    for pattern in (*selection.include, *selection.exclude):
        if not any(fnmatchcase(name, pattern) for name in linears):
            some = ", ".join(list(linears)[:3])
            raise ValueError(f'pattern "{pattern}" matches no linear layer; the layers are called like: {some}')
    chosen: list[str] = []
    left: dict[str, str] = {}
    for name, module in linears.items():
        reason = _reason(name, defaults, selection) or obstacle(name, module)
        if reason is None:
            chosen.append(name)
        else:
            left[name] = reason
    if not chosen:
        reasons = ", ".join(f"{count} {why}" for why, count in Counter(left.values()).most_common())
        raise ValueError(f"no layer to quantize: {reasons or 'the model has no linear layers'}. Remove the node.")
    return chosen, left


def _reason(name: str, defaults: Mapping[str, str | None], selection: Selection) -> str | None:
    if _matches(name, selection.exclude):
        return "excluded"
    if _matches(name, selection.include):
        return None
    return defaults.get(name, "outside the blocks")


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def weight_obstacle(weight: Tensor | None) -> str | None:
    """What keeps this weight from being quantized: there is none, it is quantized already, or too small."""
    if weight is None or weight.is_meta:
        return "without weights"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"already quantized ({type(weight).__name__})"
    if weight.dtype not in FLOATS:
        return f"already quantized ({str(weight.dtype).removeprefix('torch.')})"
    if weight.ndim != 2 or min(weight.shape) < MIN_FEATURES or any(size % MULTIPLE_OF for size in weight.shape):
        return f"smaller than {MIN_FEATURES} or no multiple of {MULTIPLE_OF}"
    return None


def _size(num_bytes: int) -> str:
    for unit in ("B", "KB", "MB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GB"
