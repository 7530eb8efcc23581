"""Lumina 2 and Z-Image: refiners for text and noise, then one stack over both, text first."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/lumina/model.py. No hooks; model patches are written into the tensor behind a block.
LUMINA2 = ModelFamily(
    name="lumina2",
    models="Lumina 2, Z-Image",
    classes=("NextDiT",),
    stacks=(BlockStack("layers", (Stream("x", None, ("txt", "img")),), in_place=True),),
    residual_diff_threshold=0.1,
)
