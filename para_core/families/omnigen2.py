"""OmniGen2: one stack over text and image (reference images in front of it), text first."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/omnigen/omnigen2.py. No hooks. The refiners in front of the stack always run.
OMNIGEN2 = ModelFamily(
    name="omnigen2",
    models="OmniGen2",
    classes=("OmniGen2Transformer2DModel",),
    stacks=(
        BlockStack(
            "layers",
            (Stream("hidden_states", None, ("txt", "img")),),
            sharding=Sharding(attentions=(("txt", "img"),), per_token=(PerToken("image_rotary_emb", ("txt", "img")),)),
        ),
    ),
    residual_diff_threshold=0.1,
)
