"""Mage-Flow: the blocks of Qwen-Image on unpacked latent pixels."""

from .family import BlockStack, ModelFamily, Stream
from .qwen_image import SHARDING

# ComfyUI: comfy/ldm/mage_flow/model.py. ControlNet and model patches write in place behind a block.
MAGE_FLOW = ModelFamily(
    name="mage_flow",
    models="Mage-Flow",
    classes=("MageFlowTransformer2DModel",),
    stacks=(
        BlockStack(
            "transformer_blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
            in_place=True,
            sharding=SHARDING,
        ),
    ),
    residual_diff_threshold=0.1,
)
