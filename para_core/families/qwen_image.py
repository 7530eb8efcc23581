"""Qwen-Image: joint blocks over image (and reference images) and text."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

SHARDING = Sharding(
    attentions=(("txt", "img"),),
    streams=(
        Stream("hidden_states", 1, ("img",)),
        Stream("encoder_hidden_states", 0, ("txt",)),
    ),
    per_token=(
        # ComfyUI 0.3 has the tokens along dim 1.
        PerToken("image_rotary_emb", ("txt", "img"), dims=(2, 1)),
        PerToken("encoder_hidden_states_mask", ("txt",), dims=(-1,)),
        # Reference images at timestep 0 stand behind the image.
        PerToken("timestep_zero_index", ("img",), kind="boundary"),
    ),
    mask_is_local=True,
    residuals="input",
)

# ComfyUI: comfy/ldm/qwen_image/model.py. ControlNet and model patches write in place behind a block.
QWEN_IMAGE = ModelFamily(
    name="qwen_image",
    models="Qwen-Image, Qwen-Image-Edit",
    classes=("qwen_image.model.QwenImageTransformer2DModel",),
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
