"""Lumina 2 and Z-Image: refiners for text and noise, then one stack over both, text first."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/lumina/model.py. No hooks; model patches are written into the tensor behind a block.
LUMINA2 = ModelFamily(
    name="lumina2",
    models="Lumina 2, Z-Image (in pixels too)",
    classes=("NextDiT",),
    stacks=(
        BlockStack(
            "layers",
            (Stream("x", None, ("txt", "img")),),
            in_place=True,
            sharding=Sharding(
                attentions=(("txt", "img"),),
                per_token=(
                    PerToken("freqs_cis", ("txt", "img")),
                    PerToken("timestep_zero_index", ("txt", "img"), kind="spans"),
                ),
            ),
        ),
    ),
    sharded=("NextDiTPixelSpace",),
    residual_diff_threshold=0.1,
)
