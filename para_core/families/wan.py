"""Wan 2.1 and 2.2: one stack of blocks over the video tokens; the text only enters through cross attention."""

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/wan/model.py
WAN = ModelFamily(
    name="wan",
    classes=("WanModel",),
    stacks=(BlockStack("blocks", (Stream("img", "img", ("img",)),), hook="double_block"),),
    refuses={"CausalWanModel": "its blocks fill a key/value cache that a skipped block would leave stale"},
    residual_diff_threshold=0.08,
)
