"""The UNets of Stable Diffusion 1.5, 2, XL and Video: what is kept is the feature map at full resolution.

It leaves the last layer with the shape in which it left the first residual layer. What flows in between on a reused
step, skip connections included, reaches nothing and only has the right shapes.
"""

from .family import BlockStack, ModelFamily, Stream

_MAP = (Stream(0, None, ("img",)),)

# ComfyUI: comfy/ldm/modules/diffusionmodules/openaimodel.py. No hooks; ControlNet adds in place behind every block.
UNET = ModelFamily(
    name="unet",
    models="Stable Diffusion 1.5, 2 and XL, SVD",
    classes=("UNetModel",),
    stacks=(
        BlockStack("input_blocks", _MAP, in_place=True, layered=True, start=1, reshapes=True),
        BlockStack("middle_block", _MAP, in_place=True),
        BlockStack("output_blocks", _MAP, in_place=True, layered=True, reshapes=True),
    ),
    unsharded={"UNetModel": "its convolutions see neighbouring tokens"},
    # WaveSpeed's README: 0.2 at 25 steps, for SDXL.
    residual_diff_threshold=0.2,
)
