"""Lens: joint blocks over image and text."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/lens/model.py. ControlNet and model patches write in place behind a block.
LENS = ModelFamily(
    name="lens",
    models="Lens",
    classes=("LensTransformer2DModel",),
    stacks=(
        BlockStack(
            "transformer_blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
            in_place=True,
        ),
    ),
    residual_diff_threshold=0.1,
)
