"""Wan 2.1 and 2.2: one stack of blocks over the video tokens; the text only enters through cross attention."""

from dataclasses import replace

from .family import BlockStack, ModelFamily, Stream

# ComfyUI: comfy/ldm/wan/. In place: VACE, S2V and WanDancer add their branch behind a block, and so do model patches.
WAN = ModelFamily(
    name="wan",
    models="Wan 2.1 and 2.2: T2V, I2V, 5B, Fun Control, Camera, S2V, HuMo, Animate, Animate 2, SCAIL, WanDancer",
    classes=("WanModel",),
    stacks=(BlockStack("blocks", (Stream("img", "img", ("img",)),), hook="double_block", in_place=True),),
    refuses={"CausalWanModel": "its blocks fill a key/value cache that a skipped block would leave stale"},
    residual_diff_threshold=0.08,
)

# The branch adds its first result behind some of the blocks, and carries on with the second.
WAN_VACE = replace(
    WAN,
    name="wan_vace",
    models="Wan 2.1 and 2.2 VACE",
    classes=("VaceWanModel",),
    refuses={},
    branches=(BlockStack("vace_blocks", (Stream("c", 0, ("skip",)), Stream("c", 1, ("vace",)))),),
)
