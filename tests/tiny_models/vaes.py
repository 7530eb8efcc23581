"""The VAEs that ComfyUI ships, small, with seeded random weights."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import pytest
import torch

from .tiny_model import host_version


@dataclass(frozen=True)
class TinyVAE:
    """How to build one VAE small.

    path: of its class below comfy.ldm or comfy. latent: shape with the batch; its height and width do not divide by 2.
    refused: how `obstacle`'s words on it begin; None where it can be split.
    since: the first ComfyUI version of those tested that has it so.
    """

    path: str
    config: dict
    latent: tuple[int, ...]
    refused: str | None = None
    since: str = "0.3.64"


DDCONFIG = {"double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32}
DDCONFIG |= {"ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
KL = "comfy.ldm.models.autoencoder.AutoencoderKL"
HUNYUAN = DDCONFIG | {"conv3d": True, "time_compress": 4, "ch_mult": [1, 1, 2]}
WAN = {"dim": 8, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1, "temperal_downsample": [False, True, True]}
IMAGE21 = {"z_channels": 4, "out_channels": 3, "in_channels": 3, "block_out_channels": [32, 32], "num_res_blocks": 1}
IMAGE21 |= {"ffactor_spatial": 4, "upsample_match_channel": True}
REFINER = IMAGE21 | {"block_out_channels": [32, 32, 64], "ffactor_temporal": 4}
LTX = {"dims": 3, "latent_channels": 128, "norm_layer": "pixel_norm", "patch_size": 4, "latent_log_var": "uniform"}
LTX |= {"decoder_base_channels": 8, "encoder_base_channels": 8, "encoder_blocks": [["res_x", {"num_layers": 1}]]}
LTX["decoder_blocks"] = [
    ["res_x", {"num_layers": 1}],
    ["compress_all", {"residual": True, "multiplier": 2}],
    ["compress_space", {"multiplier": 2}],
    ["res_x_y", {"multiplier": 1}],
]
NOISY = LTX | {"decoder_blocks": [["res_x", {"num_layers": 1, "inject_noise": True}]]}
LTX_CLASS = "comfy.ldm.lightricks.vae.causal_video_autoencoder.VideoVAE"
COSMOS = {"z_channels": 4, "latent_channels": 4, "z_factor": 1, "resolution": 64, "in_channels": 3, "out_channels": 3}
COSMOS |= {"channels": 16, "channels_mult": [1, 2, 2], "num_res_blocks": 1, "attn_resolutions": [32], "dropout": 0.0}
COSMOS |= {"patch_size": 4, "num_groups": 1, "temporal_compression": 8, "spacial_compression": 8}

VAES = {
    "SD and FLUX": TinyVAE(KL, {"ddconfig": DDCONFIG, "embed_dim": 4}, (2, 4, 5, 9)),
    "FLUX.2": TinyVAE(
        KL, {"ddconfig": DDCONFIG | {"batch_norm_latent": True}, "embed_dim": 4}, (1, 16, 5, 9), since="0.33"
    ),
    "HunyuanVideo": TinyVAE(KL, {"ddconfig": HUNYUAN, "embed_dim": 4}, (1, 4, 4, 5, 9)),
    "HunyuanVideo, one frame": TinyVAE(KL, {"ddconfig": HUNYUAN, "embed_dim": 4}, (1, 4, 1, 5, 9)),
    "HunyuanImage 2.1": TinyVAE("comfy.ldm.hunyuan_video.vae.Decoder", IMAGE21, (1, 4, 5, 9)),
    "HunyuanVideo 1.5": TinyVAE("comfy.ldm.hunyuan_video.vae_refiner.Decoder", REFINER, (1, 4, 5, 5, 9), since="0.33"),
    "HunyuanImage refiner": TinyVAE(
        "comfy.ldm.hunyuan_video.vae_refiner.Decoder", REFINER | {"refiner_vae": False}, (1, 4, 1, 5, 9)
    ),
    "Wan 2.1": TinyVAE("comfy.ldm.wan.vae.WanVAE", WAN, (1, 4, 5, 5, 9)),
    "Wan 2.1, one frame": TinyVAE("comfy.ldm.wan.vae.WanVAE", WAN, (1, 4, 1, 5, 9)),
    "Wan 2.2": TinyVAE("comfy.ldm.wan.vae2_2.WanVAE", WAN | {"dec_dim": 8}, (1, 4, 3, 5, 9)),
    "TAESD": TinyVAE("comfy.taesd.taesd.TAESD", {"latent_channels": 16}, (1, 16, 5, 9)),
    "TAEHV": TinyVAE("comfy.taesd.taehv.TAEHV", {"latent_channels": 16}, (1, 16, 3, 5, 9)),
    "TAEHV, all frames at once": TinyVAE(
        "comfy.taesd.taehv.TAEHV", {"latent_channels": 32, "parallel": True}, (1, 32, 3, 5, 9)
    ),
    "LTX": TinyVAE(LTX_CLASS, {"config": LTX}, (1, 128, 3, 5, 9)),
    "LTX, causal": TinyVAE(LTX_CLASS, {"config": LTX | {"causal_decoder": True}}, (1, 128, 3, 5, 9)),
    "LTX, with timestep": TinyVAE(LTX_CLASS, {"config": LTX | {"timestep_conditioning": True}}, (1, 128, 3, 5, 9)),
    "LTX, with injected noise": TinyVAE(
        LTX_CLASS, {"config": NOISY}, (1, 128, 3, 5, 9), refused="ResnetBlock3D of VideoVAE: aten::add"
    ),
    "CogVideoX": TinyVAE(
        "comfy.ldm.cogvideo.vae.AutoencoderKLCogVideoX",
        {"latent_channels": 4, "block_out_channels": (32, 32, 32, 32), "layers_per_block": 1},
        (1, 4, 3, 5, 9),
        refused="SpatialNorm3D of AutoencoderKLCogVideoX: aten::upsample_nearest3d",
    ),
    "Cosmos": TinyVAE(
        "comfy.ldm.cosmos.vae.CausalContinuousVideoTokenizer",
        COSMOS,
        (1, 4, 2, 5, 9),
        refused="CausalTemporalAttnBlock of CausalContinuousVideoTokenizer: aten::tril",
    ),
}
SPLIT = [title for title, vae in VAES.items() if vae.refused is None]


def build_vae(title: str) -> torch.nn.Module:
    """A VAE, or its decoder alone, with seeded weights; skips the test where this ComfyUI has no such class."""
    tiny = VAES[title]
    if host_version() < tuple(map(int, tiny.since.split("."))):
        pytest.skip(f"this ComfyUI has no {title}; {tiny.since} has")
    module, _, name = tiny.path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except ImportError:
        pytest.skip(f"this ComfyUI has no {title}")
    vae = found(**tiny.config).eval()
    generator = torch.Generator().manual_seed(0)
    for key, tensor in (*vae.named_parameters(), *vae.named_buffers()):
        if tensor.is_floating_point() and 0 not in tensor.stride():
            tensor.data.copy_(_values(key, tensor, generator))
    return vae


def _values(key: str, tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights large enough that attention is far from uniform, and norms that do not hide a wrong statistic."""
    noise = torch.randn(tensor.shape, generator=generator)
    if tensor.ndim >= 2 and tensor[0].numel() > 1:
        return noise * 1.5 / tensor[0].numel() ** 0.5
    if key.endswith("bias"):
        return 0.3 * noise
    return (1 + 0.3 * noise).abs() if "running_var" in key else 1 + 0.3 * noise


def latent(title: str) -> torch.Tensor:
    """With a mean that differs from one end to the other: no two slices have the same statistics."""
    shape = VAES[title].latent
    z = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    slope = torch.linspace(-1, 1, shape[-2])[:, None] + torch.linspace(1, -1, shape[-1])
    return z + slope


def decode(vae: torch.nn.Module, z: torch.Tensor) -> torch.Tensor:
    """As the host does; noise is drawn from a fixed seed."""
    torch.manual_seed(0)
    return (vae.decode if hasattr(vae, "decode") else vae)(z)
