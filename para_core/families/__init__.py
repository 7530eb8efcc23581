"""Which model families are known, and how to find the one that a model belongs to."""

import functools
import importlib
import pkgutil

from torch import nn

from .family import BlockStack, ModelFamily
from .refused import REFUSED
from .sharding import Attention, PerToken, Sharding
from .stream import Stream

__all__ = [
    "FAMILIES", "REASONS", "Attention", "BlockStack", "ModelFamily", "PerToken", "Sharding", "Stream", "family_of",
]  # fmt: skip

# Every file of this folder is a family, or a few close ones; a leading underscore marks another file's.
FAMILIES: tuple[ModelFamily, ...] = tuple(
    found
    for module in pkgutil.iter_modules(__path__)
    for name, found in vars(importlib.import_module(f"{__name__}.{module.name}")).items()
    if isinstance(found, ModelFamily) and not name.startswith("_")
)

# Class names that cannot be served, those of families' close relatives included, with the reason.
REASONS: dict[str, str] = REFUSED | {name: reason for family in FAMILIES for name, reason in family.refuses.items()}


def family_of(model: nn.Module) -> ModelFamily:
    """The family of a diffusion model, by the class names along its MRO.

    Raises ValueError, naming the class and what is supported, for a model that no family serves.
    """
    for family in _families_of_class(type(model)):
        if family.describes(model):
            return family
    supported = ", ".join(dict.fromkeys(family.models for family in FAMILIES))
    raise ValueError(
        f"{type(model).__name__} is not a model that Para Accelerate knows; supported are: {supported}. "
        "Connect one of these, or remove the node."
    )


@functools.cache
def _families_of_class(model_class: type[nn.Module]) -> tuple[ModelFamily, ...]:
    """Those that name the class, or else the nearest class above it; those with a marker first."""
    for cls in model_class.__mro__:
        path = f".{cls.__module__}.{cls.__qualname__}"
        for name, reason in REASONS.items():
            if path.endswith(f".{name}"):
                raise ValueError(f"{model_class.__name__} cannot be accelerated: {reason}. Remove the node.")
        found = [family for family in FAMILIES if any(path.endswith(f".{name}") for name in family.classes)]
        if found:
            return tuple(sorted(found, key=lambda family: not family.marker))
    return ()
