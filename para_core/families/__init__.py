"""Which model families are known, and how to find the one that a model belongs to."""

from torch import nn

from .family import BlockStack, ModelFamily, Stream
from .flux import FLUX, FLUX_DIFFUSERS
from .wan import WAN

__all__ = ["FAMILIES", "BlockStack", "ModelFamily", "Stream", "family_of"]

FAMILIES: tuple[ModelFamily, ...] = (FLUX, FLUX_DIFFUSERS, WAN)


def family_of(model: nn.Module) -> ModelFamily:
    """The family of a diffusion model, by the class names along its MRO.

    Raises ValueError, naming the class and what is supported, for a model that no family serves.
    """
    mro = [cls.__name__ for cls in type(model).__mro__]
    for family in FAMILIES:
        if not set(mro).isdisjoint(family.classes):
            for name in mro:
                if name in family.refuses:
                    raise ValueError(f"{mro[0]} cannot be accelerated: {family.refuses[name]}. Remove the node.")
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.classes)
    raise ValueError(
        f"{mro[0]} is not a model that Para Accelerate knows; supported are: {supported}. "
        "Connect one of these, or remove the node."
    )
