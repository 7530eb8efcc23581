"""Lens: joint blocks over image and text."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/lens/model.py. ControlNet and model patches write in place behind a block.
LENS = ModelFamily(
    name="lens",
    models="Lens",
    classes=("LensTransformer2DModel",),
    stacks=(
        BlockStack(
            "transformer_blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
            in_place=True,
            sharding=Sharding(
                attentions=(("img", "txt"),),
                streams=(
                    Stream("hidden_states", 1, ("img",)),
                    Stream("encoder_hidden_states", 0, ("txt",)),
                ),
                # The block refuses a mask that is not about just its own tokens.
                per_token=(
                    PerToken("freqs_cis", ("img", "txt"), dims=(2,)),
                    PerToken("attention_mask", ("img", "txt"), dims=(-1,)),
                ),
                mask_is_local=True,
                residuals="input",
            ),
        ),
    ),
    residual_diff_threshold=0.1,
)
