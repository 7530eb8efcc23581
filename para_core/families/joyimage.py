"""JoyImage: joint blocks over image (and reference images) and text."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/joyimage/model.py
JOYIMAGE = ModelFamily(
    name="joyimage",
    models="JoyImage",
    classes=("JoyImageTransformer3DModel",),
    stacks=(
        BlockStack(
            "double_blocks",
            (Stream("img", "img", ("img",)), Stream("txt", "txt", ("txt",))),
            hook="double_block",
            sharding=Sharding(
                attentions=(("img", "txt"),),
                streams=(Stream("hidden_states", 0, ("img",)), Stream("encoder_hidden_states", 1, ("txt",))),
                per_token=(PerToken("image_rotary_emb", ("img",)),),
            ),
        ),
    ),
    residual_diff_threshold=0.1,
)
