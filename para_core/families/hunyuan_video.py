"""HunyuanVideo 1 and 1.5 and HunyuanImage 2.1: the blocks of FLUX over video tokens; 1.5 has no single blocks."""

from dataclasses import replace

from .family import BlockStack, Stream
from .flux import DOUBLE_SHARDING, SINGLE_SHARDING
from .flux import FLUX as _FLUX
from .sharding import PerToken, Sharding

# The host applies the image's spans (a guiding frame at a timestep of its own) to text and image alike, from the front.
_SINGLE = replace(
    SINGLE_SHARDING,
    per_token=(
        PerToken("pe", ("txt", "img"), dims=(2,)),
        PerToken("modulation_dims", ("txt", "img"), kind="spans"),
    ),
)

# ComfyUI: comfy/ldm/hunyuan_video/model.py
HUNYUAN_VIDEO = replace(
    _FLUX,
    name="hunyuan_video",
    models="HunyuanVideo, HunyuanVideo 1.5, HunyuanImage 2.1",
    classes=("HunyuanVideo",),
    stacks=(_FLUX.stacks[0], replace(_FLUX.stacks[1], sharding=_SINGLE)),
    # WaveSpeed's README: 0.1 at 20 steps.
    residual_diff_threshold=0.1,
)


def _image_first(sharding: Sharding) -> Sharding:
    """The same with image and text exchanged wherever they stand together."""
    per_token = tuple(replace(found, holds=found.holds[::-1]) for found in sharding.per_token)
    streams = tuple(replace(stream, holds=stream.holds[::-1]) for stream in sharding.streams)
    return replace(sharding, attentions=(("img", "txt"),), per_token=per_token, streams=streams)


# Before core e1add563 the single blocks had the image first; the same commit renamed the weights of the norms.
HUNYUAN_VIDEO_IMAGE_FIRST = replace(
    HUNYUAN_VIDEO,
    marker="double_blocks.0.img_attn.norm.query_norm.scale",
    stacks=(
        replace(_FLUX.stacks[0], sharding=_image_first(DOUBLE_SHARDING)),
        BlockStack(
            "single_blocks",
            (Stream("img", "img", ("img", "txt")),),
            hook="single_block",
            in_place=True,
            sharding=_image_first(_SINGLE),
        ),
    ),
)
