"""LTX-Video, and LTX-AV (LTX 2) whose blocks carry video and audio side by side; both leave the model."""

from .family import BlockStack, ModelFamily, Stream
from .sharding import PerToken, Sharding

# ComfyUI: comfy/ldm/lightricks/model.py
LTXV = ModelFamily(
    name="ltxv",
    models="LTX-Video",
    classes=("LTXVModel",),
    stacks=(
        BlockStack(
            "transformer_blocks",
            (Stream("img", "img", ("img",)),),
            hook="double_block",
            in_place=True,
            sharding=Sharding(
                attentions=(("img",),),
                streams=(Stream("x", None, ("img",)),),
                per_token=(
                    # Two tensors in ComfyUI 0.3, later one and a switch.
                    PerToken("pe", ("img",), part=0),
                    PerToken("pe", ("img",), part=1),
                    PerToken("timestep", ("img",)),
                    PerToken("self_attention_mask", ("img",), kind="unsupported"),
                ),
                switches={"stg_skip_self_attn": False},
            ),
        ),
    ),
    # WaveSpeed's README: 0.1 at 30 steps.
    residual_diff_threshold=0.1,
)

_VIDEO_TIMES = ("v_timestep", "v_cross_scale_shift_timestep", "v_cross_gate_timestep")
_AUDIO_TIMES = ("a_timestep", "a_cross_scale_shift_timestep", "a_cross_gate_timestep")
_SWITCHES = ("run_vx", "run_ax", "a2v_cross_attn", "v2a_cross_attn")

# ComfyUI: comfy/ldm/lightricks/av_model.py
LTXAV = ModelFamily(
    name="ltxav",
    models="LTX-AV (LTX 2)",
    classes=("LTXAVModel",),
    stacks=(
        BlockStack(
            "transformer_blocks",
            (Stream("img", "img", ("video",), part=0), Stream("img", "img", ("audio",), part=1)),
            hook="double_block",
            in_place=True,
            sharding=Sharding(
                # Video: self, text. Audio: self, text. Then each to the other.
                attentions=(("video",), (), ("audio",), (), (("video",), ("audio",)), (("audio",), ("video",))),
                streams=(Stream("x", None, ("video",), part=0), Stream("x", None, ("audio",), part=1)),
                per_token=(
                    PerToken("v_pe", ("video",), part=0),
                    PerToken("a_pe", ("audio",), part=0),
                    PerToken("v_cross_pe", ("video",), part=0),
                    PerToken("a_cross_pe", ("audio",), part=0),
                    *(PerToken(name, ("video",), repeats=True, attribute="data") for name in _VIDEO_TIMES),
                    *(PerToken(name, ("audio",)) for name in _AUDIO_TIMES),
                    PerToken("self_attention_mask", ("video",), kind="unsupported"),
                ),
                switches={"stg_skip_self_attn": False, **dict.fromkeys(_SWITCHES, True)},
            ),
        ),
    ),
    cached=("video", "audio"),
    residual_diff_threshold=0.1,
)
