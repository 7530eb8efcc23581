"""AuraFlow: a few double blocks over image and text, then single blocks over both, text first."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/aura/mmdit.py
AURA_FLOW = ModelFamily(
    name="aura_flow",
    models="AuraFlow",
    classes=("aura.mmdit.MMDiT",),
    stacks=(
        BlockStack(
            "double_layers", (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))), hook="double_block"
        ),
        BlockStack("single_layers", (Stream("img", "img", ("txt", "img")),), hook="single_block"),
    ),
    residual_diff_threshold=0.1,
)
