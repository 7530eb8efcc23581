"""Kandinsky 5: one stack over the video tokens; the text only enters through cross attention."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/kandinsky5/model.py. Its hook calls the block by names that the block does not have (0.33.0).
KANDINSKY5 = ModelFamily(
    name="kandinsky5",
    models="Kandinsky 5 video and image",
    classes=("Kandinsky5",),
    stacks=(
        BlockStack(
            "visual_transformer_blocks",
            (Stream("visual_embed", None, ("img",)),),
            sharding=Sharding(attentions=(("img",),), per_token=(PerToken("freqs", ("img",)),)),
        ),
    ),
    residual_diff_threshold=0.1,
)
