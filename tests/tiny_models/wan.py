"""Tiny Wan models, and what each variant is conditioned on."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch

from .tiny_model import TinyModel, randn

WAN = TinyModel(
    "Wan T2V", "wan", "WAN21_T2V",
    {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "dim": 256,
        "ffn_dim": 512, "freq_dim": 256, "text_dim": 64, "out_dim": 16, "num_heads": 4, "num_layers": 4,
    },
    latent=(16, 3, 6, 10),
)  # fmt: skip

_SMALL = WAN.unet_config | {"dim": 64, "ffn_dim": 128, "freq_dim": 64, "num_heads": 2}


def _clip(generator: torch.Generator) -> dict:
    return {"clip_vision_output": SimpleNamespace(penultimate_hidden_states=randn(generator, 1, 5, 1280))}


I2V = replace(
    WAN, title="Wan I2V", config="WAN21_I2V", unet_config=_SMALL | {"model_type": "i2v", "in_dim": 36},
    extra=lambda t, g, n: _clip(g) | {"concat_latent_image": randn(g, 1, 16, *t.latent[1:])},
)  # fmt: skip

WAN_5B = replace(
    WAN, title="Wan 5B", config="WAN22_T2V", unet_config=_SMALL | {"in_dim": 48, "out_dim": 48}, latent=(48, 3, 6, 10)
)

VACE = replace(
    WAN, title="Wan VACE", family="wan_vace", config="WAN21_Vace",
    unet_config=_SMALL | {"model_type": "vace", "vace_layers": 2, "vace_in_dim": 96},
    extra=lambda t, g, n: {
        "vace_frames": [randn(g, 1, 32, *t.latent[1:])], "vace_mask": [torch.ones(1, 64, *t.latent[1:])],
        "vace_strength": [0.7],
    },
)  # fmt: skip

CAMERA = replace(
    WAN, title="Wan Camera", config="WAN21_Camera", unet_config=_SMALL | {"model_type": "camera", "in_dim": 32},
    extra=lambda t, g, n: _clip(g) | {
        "camera_conditions": randn(g, 1, 24, t.latent[1], t.latent[2] * 8, t.latent[3] * 8)
    },
)  # fmt: skip

FUN_CONTROL = replace(
    WAN, title="Wan Fun Control", config="WAN21_FunControl2V",
    unet_config=_SMALL | {"model_type": "i2v", "in_dim": 48, "in_dim_ref_conv": 16},
    extra=lambda t, g, n: _clip(g) | {
        "concat_latent_image": randn(g, 1, 32, *t.latent[1:]), "reference_latents": [randn(g, 1, 16, 1, *t.latent[2:])]
    },
)  # fmt: skip

S2V = replace(
    WAN, title="Wan S2V", config="WAN22_S2V",
    unet_config=_SMALL | {
        "model_type": "s2v", "audio_dim": 32, "num_audio_token": 2, "cond_dim": 16, "audio_inject_layers": [0, 2, 3]
    },
    extra=lambda t, g, n: {
        "audio_embed": randn(g, 1, 25, 32, 12), "reference_latents": [randn(g, 1, 16, 1, *t.latent[2:])],
        "control_video": randn(g, 1, 16, *t.latent[1:]),
    },
)  # fmt: skip


class _AudioTokens(torch.nn.Module):
    """In place of HuMo's audio projection of 26 million weights: (b, f, w, blocks, channels) to (b, f, 16, 1536)."""

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return audio.flatten(2)[..., :1536].unsqueeze(2).repeat(1, 1, 16, 1) * torch.linspace(-1, 1, 16)[:, None]


def _light_humo(model: torch.nn.Module) -> None:
    model.audio_proj = _AudioTokens()


HUMO = replace(
    WAN, title="Wan HuMo", config="WAN21_HuMo", unet_config=_SMALL | {"model_type": "humo"}, shrink=_light_humo,
    extra=lambda t, g, n: {
        "audio_embed": randn(g, 1, 3, 8, 5, 64), "reference_latents": [randn(g, 1, 16, 1, *t.latent[2:])]
    },
)  # fmt: skip


class _MotionEncoder(torch.nn.Module):
    """In place of Animate's encoder of 512 x 512 faces."""

    def get_motion(self, img: torch.Tensor) -> torch.Tensor:
        return img.flatten(1)[:, :64]


class _FaceEncoder(torch.nn.Module):
    """In place of 19 million weights: (b, t, 64) to (b, t, 3, 64)."""

    def forward(self, motion: torch.Tensor) -> torch.Tensor:
        return motion.unsqueeze(2) * torch.linspace(-1, 1, 3)[:, None]


def _light_animate(model: torch.nn.Module) -> None:
    model.motion_encoder, model.face_encoder = _MotionEncoder(), _FaceEncoder()


ANIMATE = replace(
    WAN, title="Wan Animate", config="WAN22_Animate", shrink=_light_animate,
    unet_config=_SMALL | {"model_type": "animate", "in_dim": 36, "num_layers": 5},
    extra=lambda t, g, n: _clip(g) | {
        "face_video_pixels": randn(g, 1, 3, 2, 8, 8), "pose_video_latent": randn(g, 1, 16, 2, *t.latent[2:])
    },
)  # fmt: skip

ANIMATE2 = replace(
    WAN, title="Wan Animate 2", config="WAN_Animate2", unet_config=_SMALL | {"model_type": "animate2", "in_dim": 36},
    extra=lambda t, g, n: _clip(g) | {"pose_video_latent": randn(g, 1, 16, 2, *t.latent[2:])}, since="0.33.0",
)  # fmt: skip

SCAIL = replace(
    WAN, title="Wan SCAIL", config="WAN21_SCAIL", unet_config=_SMALL | {"model_type": "scail", "in_dim": 20},
    extra=lambda t, g, n: _clip(g) | {
        "pose_video_latent": randn(g, 1, 16, 3, t.latent[2] // 2, t.latent[3] // 2),
        "reference_latents": [randn(g, 1, 16, 1, *t.latent[2:])],
    },
    since="0.33.0",
)  # fmt: skip

SCAIL2 = replace(
    SCAIL, title="Wan SCAIL 2", config="WAN21_SCAIL2", unet_config=SCAIL.unet_config | {"model_type": "scail2"},
    extra=lambda t, g, n: SCAIL.extra(t, g, n) | {
        "driving_mask_28ch": randn(g, 1, 3, 28, t.latent[2] // 2, t.latent[3] // 2),
        "ref_mask_28ch": randn(g, 1, 1 + t.latent[1], 28, *t.latent[2:]), "ref_mask_flag": False,
    },
)  # fmt: skip

WANDANCER = replace(
    WAN, title="WanDancer", config="WAN22_WanDancer", latent=(16, 3, 8, 8), since="0.33.0",
    unet_config=_SMALL | {
        "model_type": "wandancer", "in_dim": 36, "audio_inject_layers": [0, 2, 3], "music_dim": 32, "music_heads": 2,
        "music_feature_dim": 35, "music_latent_dim": 32,
    },
    extra=lambda t, g, n: _clip(g) | {"audio_embed": randn(g, 1, 11, 35)},
)  # fmt: skip

WANS = {
    "wan": WAN, "wan_i2v": I2V, "wan_5b": WAN_5B, "wan_vace": VACE, "wan_camera": CAMERA, "wan_fun": FUN_CONTROL,
    "wan_s2v": S2V, "wan_humo": HUMO, "wan_animate": ANIMATE, "wan_animate2": ANIMATE2, "wan_scail": SCAIL,
    "wan_scail2": SCAIL2, "wandancer": WANDANCER,
}  # fmt: skip
