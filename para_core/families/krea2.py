"""Krea 2: one stack over text and image (and reference images), text first."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/krea2/model.py. No hooks.
KREA2 = ModelFamily(
    name="krea2",
    models="Krea 2",
    classes=("krea2.model.SingleStreamDiT",),
    stacks=(
        BlockStack(
            "blocks",
            (Stream("x", None, ("txt", "img")),),
            sharding=Sharding(
                attentions=(("txt", "img"),),
                per_token=(
                    PerToken("freqs", ("txt", "img"), dims=(2,)),
                    PerToken("timestep_zero_index", ("txt", "img"), kind="boundary"),
                ),
            ),
        ),
    ),
    residual_diff_threshold=0.1,
)
