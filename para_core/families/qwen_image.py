"""Qwen-Image: joint blocks over image (and reference images) and text."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/qwen_image/model.py. ControlNet and model patches write in place behind a block.
QWEN_IMAGE = ModelFamily(
    name="qwen_image",
    models="Qwen-Image, Qwen-Image-Edit",
    classes=("QwenImageTransformer2DModel",),
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
