"""HunyuanVideo 1 and 1.5 and HunyuanImage 2.1: the blocks of FLUX over video tokens; 1.5 has no single blocks."""

from dataclasses import replace

from .family import BlockStack, Stream
from .flux import FLUX as _FLUX

# ComfyUI: comfy/ldm/hunyuan_video/model.py
HUNYUAN_VIDEO = replace(
    _FLUX,
    name="hunyuan_video",
    models="HunyuanVideo, HunyuanVideo 1.5, HunyuanImage 2.1",
    classes=("HunyuanVideo",),
    # WaveSpeed's README: 0.1 at 20 steps.
    residual_diff_threshold=0.1,
)

# Before core e1add563 the single blocks had the image first; the same commit renamed the weights of the norms.
HUNYUAN_VIDEO_IMAGE_FIRST = replace(
    HUNYUAN_VIDEO,
    marker="double_blocks.0.img_attn.norm.query_norm.scale",
    stacks=(
        _FLUX.stacks[0],
        BlockStack("single_blocks", (Stream("img", "img", ("img", "txt")),), hook="single_block", in_place=True),
    ),
)
