"""Mochi 1: joint blocks over video and text; the last one leaves the text as it is."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/genmo/joint_model/asymm_models_joint.py
MOCHI = ModelFamily(
    name="mochi",
    models="Mochi 1",
    classes=("AsymmDiTJoint",),
    stacks=(
        BlockStack(
            "blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
            sharding=Sharding(
                attentions=(("img", "txt"),),
                streams=(Stream("x", 0, ("img",)), Stream("y", 1, ("txt",))),
                per_token=(
                    PerToken("rope_cos", ("img",), dims=(0,)),
                    PerToken("rope_sin", ("img",), dims=(0,)),
                    # The padding behind this many text tokens takes no part in the attention.
                    PerToken("crop_y", ("txt",), kind="crop"),
                ),
            ),
        ),
    ),
    residual_diff_threshold=0.1,
)
