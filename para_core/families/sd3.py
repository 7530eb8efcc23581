"""Stable Diffusion 3 and 3.5: joint blocks over image and text; the last one drops the text."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import Sharding

# ComfyUI: comfy/ldm/modules/diffusionmodules/mmdit.py. The host adds ControlNet residuals in place behind every block.
SD3 = ModelFamily(
    name="sd3",
    models="Stable Diffusion 3 and 3.5",
    classes=("OpenAISignatureMMDITWrapper",),
    stacks=(
        BlockStack(
            "joint_blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
            in_place=True,
            sharding=Sharding(
                # The second attention of 3.5's first blocks is over the image alone.
                attentions=(("txt", "img"), ("img",)),
                streams=(Stream(1, 1, ("img",)), Stream(0, 0, ("txt",))),
                residuals="output",
            ),
        ),
    ),
    # WaveSpeed's README: 0.12 at 30 steps, for 3.5.
    residual_diff_threshold=0.12,
)
