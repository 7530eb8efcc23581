"""AuraFlow: a few double blocks over image and text, then single blocks over both, text first."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import Sharding

# ComfyUI: comfy/ldm/aura/mmdit.py
AURA_FLOW = ModelFamily(
    name="aura_flow",
    models="AuraFlow",
    classes=("aura.mmdit.MMDiT",),
    stacks=(
        BlockStack(
            "double_layers",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
            sharding=Sharding(
                attentions=(("txt", "img"),),
                streams=(Stream("x", 1, ("img",)), Stream("c", 0, ("txt",))),
            ),
        ),
        BlockStack(
            "single_layers",
            (Stream("img", "img", ("txt", "img")),),
            hook="single_block",
            sharding=Sharding(attentions=(("txt", "img"),), streams=(Stream("cx", None, ("txt", "img")),)),
        ),
    ),
    residual_diff_threshold=0.1,
)
