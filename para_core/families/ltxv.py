"""LTX-Video, and LTX-AV (LTX 2) whose blocks carry video and audio side by side; both leave the model."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/lightricks/model.py
LTXV = ModelFamily(
    name="ltxv",
    models="LTX-Video",
    classes=("LTXVModel",),
    stacks=(
        BlockStack(
            "transformer_blocks",
            (Stream("img", "img", ("img",)),),
            hook="double_block",
            in_place=True,
            sharding=Sharding(
                attentions=(("img",),),
                streams=(Stream("x", None, ("img",)),),
                per_token=(
                    # Two tensors in ComfyUI 0.3, later one and a switch.
                    PerToken("pe", ("img",), part=0),
                    PerToken("pe", ("img",), part=1),
                    PerToken("timestep", ("img",)),
                    PerToken("self_attention_mask", ("img",), kind="unsupported"),
                ),
            ),
        ),
    ),
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
