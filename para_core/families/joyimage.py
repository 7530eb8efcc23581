"""JoyImage: joint blocks over image (and reference images) and text."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/joyimage/model.py
JOYIMAGE = ModelFamily(
    name="joyimage",
    models="JoyImage",
    classes=("JoyImageTransformer3DModel",),
    stacks=(
        BlockStack(
            "double_blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
        ),
    ),
    residual_diff_threshold=0.1,
)
