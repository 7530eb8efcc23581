"""CogVideoX 1 and 1.5: joint blocks over video and text."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/cogvideo/model.py. No hooks. Only the 5B models have rotary positions: a cosine and a sine.
COGVIDEOX = ModelFamily(
    name="cogvideox",
    models="CogVideoX",
    classes=("cogvideo.model.CogVideoXTransformer3DModel",),
    stacks=(
        BlockStack(
            "blocks",
            (Stream("hidden_states", 0, ("img",)), Stream("encoder_hidden_states", 1, ("txt",))),
            sharding=Sharding(
                attentions=(("txt", "img"),),
                per_token=tuple(PerToken("image_rotary_emb", ("img",), dims=(0,), part=part) for part in (0, 1)),
            ),
        ),
    ),
    residual_diff_threshold=0.1,
)
