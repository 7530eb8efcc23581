"""Wan 2.1 and 2.2: one stack of blocks over the video tokens; the text only enters through cross attention."""

from dataclasses import replace

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

_SHARDING = Sharding(
    attentions=(("img",),),
    streams=(Stream("x", None, ("img",)),),
    # Where frames have timesteps of their own, `e` has a row for each frame or token.
    per_token=(PerToken("freqs", ("img",)), PerToken("e", ("img",), repeats=True, ndim=4)),
)

# ComfyUI: comfy/ldm/wan/. In place: VACE, S2V and WanDancer add their branch behind a block, and so do model patches.
WAN = ModelFamily(
    name="wan",
    models=(
        "Wan 2.1 and 2.2: T2V, I2V, 5B, Fun Control, Camera, S2V, HuMo, Animate, Animate 2, SCAIL, SCAIL 2, WanDancer"
    ),
    classes=("WanModel",),
    stacks=(
        BlockStack(
            "blocks",
            (Stream("img", "img", ("img",)),),
            hook="double_block",
            in_place=True,
            sharding=_SHARDING,
        ),
    ),
    refuses={"CausalWanModel": "its blocks fill a key/value cache that a skipped block would leave stale"},
    residual_diff_threshold=0.08,
    sharded=("CameraWanModel", "SCAILWanModel", "SCAIL2WanModel"),
    unsharded={
        "WanModel_S2V": "it adds audio to whole frames between its blocks",
        "HumoWanModel": "its blocks attend to the audio of whole frames",
        "AnimateWanModel": "it adds faces to whole frames between its blocks",
        "WanAnimate2Model": "its attention runs frame by frame, with the pose of that frame",
        "WanDancerModel": "it adds music to whole frames between its blocks",
    },
)

# The branch adds its first result behind some of the blocks, and carries on with the second.
WAN_VACE = replace(
    WAN,
    name="wan_vace",
    models="Wan 2.1 and 2.2 VACE",
    classes=("VaceWanModel",),
    refuses={},
    sharded=(),
    branches=(
        BlockStack(
            "vace_blocks",
            (Stream("c", 0, ("skip",)), Stream("c", 1, ("vace",))),
            sharding=replace(
                _SHARDING,
                streams=(Stream("c", 0, ("img",)),),
                # The first block gets all tokens, the others what the one in front has returned.
                per_token=(*_SHARDING.per_token, PerToken("x", ("img",)), PerToken("c", ("img",), counted=("img",))),
            ),
        ),
    ),
)
