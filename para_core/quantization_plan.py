"""Which linears of a model are quantized, and which are left and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from .families import ModelFamily

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
