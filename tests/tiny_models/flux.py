"""Tiny models of the FLUX family."""

from __future__ import annotations

from dataclasses import replace

import torch

from .tiny_model import TinyModel, randn

FLUX = TinyModel(
    "FLUX.1", "flux", "FluxSchnell",
    {
        "image_model": "flux", "guidance_embed": False, "in_channels": 16, "out_channels": 16, "patch_size": 2,
        "vec_in_dim": 64, "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 3, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
    },
    latent=(16, 10, 14), pooled_dim=64, since_033={"txt_ids_dims": []},
)  # fmt: skip

KONTEXT = replace(FLUX, title="Kontext", extra=lambda t, g, n: {"reference_latents": [randn(g, 1, 16, 6, 10)]})

FLUX2 = TinyModel(
    "FLUX.2 and Klein", "flux", "Flux2",
    {
        "image_model": "flux2", "guidance_embed": True, "in_channels": 128, "out_channels": 128, "patch_size": 1,
        "vec_in_dim": None, "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 3.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 3, "axes_dim": [8, 8, 8, 8], "theta": 2000, "qkv_bias": False,
        "global_modulation": True, "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0, "txt_ids_dims": [3],
    },
    latent=(128, 5, 7), extra=lambda t, g, n: {"reference_latents": [randn(g, 1, 128, 3, 3)]}, since="0.33.0",
)  # fmt: skip

LONGCAT = replace(
    FLUX, title="LongCat-Image", config="LongCatImage", pooled_dim=0, since="0.33.0",
    unet_config=FLUX.unet_config | {"vec_in_dim": None, "txt_ids_dims": [1, 2]}, since_033={},
)  # fmt: skip

OVIS = replace(
    FLUX, title="Ovis-Image", since="0.33.0",
    unet_config=FLUX.unet_config | {"yak_mlp": True, "txt_norm": True, "txt_ids_dims": [1, 2]}, since_033={},
)  # fmt: skip

CHROMA = TinyModel(
    "Chroma", "chroma", "Chroma",
    {
        "image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "context_in_dim": 64,
        "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2, "depth_single_blocks": 3,
        "axes_dim": [8, 12, 12], "theta": 10000, "qkv_bias": True, "in_dim": 64, "out_dim": 64, "hidden_dim": 64,
        "n_layers": 2,
    },
    latent=(16, 10, 14), pooled_dim=8, since_033={"vec_in_dim": None, "txt_ids_dims": []},
)  # fmt: skip

RADIANCE = replace(
    CHROMA, title="Chroma Radiance", config="ChromaRadiance", latent=(3, 20, 28),
    unet_config=CHROMA.unet_config | {
        "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 4,
        "nerf_hidden_size": 16, "nerf_mlp_ratio": 2, "nerf_depth": 2, "nerf_max_freqs": 4, "nerf_tile_size": 0,
        "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32,
    },
    since_033=CHROMA.since_033 | {"use_x0": False, "use_sequential_txt_ids": True},
)  # fmt: skip
