"""LTX-Video, and LTX-AV (LTX 2) whose blocks carry video and audio side by side; both leave the model."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/lightricks/model.py
LTXV = ModelFamily(
    name="ltxv",
    models="LTX-Video",
    classes=("LTXVModel",),
    stacks=(BlockStack("transformer_blocks", (Stream("img", "img", ("img",)),), hook="double_block", in_place=True),),
    # WaveSpeed's README: 0.1 at 30 steps.
    residual_diff_threshold=0.1,
)

# ComfyUI: comfy/ldm/lightricks/av_model.py
LTXAV = ModelFamily(
    name="ltxav",
    models="LTX-AV (LTX 2)",
    classes=("LTXAVModel",),
    stacks=(
        BlockStack(
            "transformer_blocks",
            (Stream("img", "img", ("video",), part=0), Stream("img", "img", ("audio",), part=1)),
            hook="double_block",
            in_place=True,
        ),
    ),
    cached=("video", "audio"),
    residual_diff_threshold=0.1,
)
