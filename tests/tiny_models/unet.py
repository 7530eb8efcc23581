"""Tiny UNets; the odd sizes make every upsampling depend on the skip connection's size."""

from __future__ import annotations

from dataclasses import replace

from .tiny_model import TinyModel, randn

SD15 = TinyModel(
    "SD 1.5", "unet", "SD15",
    {
        "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1, 1],
        "channel_mult": [1, 2, 2], "transformer_depth": [1, 1, 0], "transformer_depth_output": [1, 1, 1, 1, 0, 0],
        "transformer_depth_middle": 1, "context_dim": 64, "use_spatial_transformer": True,
        "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False,
        "use_temporal_resblock": False, "legacy": False,
    },
    latent=(4, 9, 13),
)  # fmt: skip

SDXL = replace(
    SD15, title="SDXL", config="SDXL", pooled_dim=1280,
    unet_config=SD15.unet_config | {
        "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1], "channel_mult": [1, 2, 4],
        "use_linear_in_transformer": True, "adm_in_channels": 2816, "num_classes": "sequential",
    },
)  # fmt: skip

# The batch is the video.
SVD = replace(
    SD15, title="SVD", config="SVD_img2vid",
    unet_config=SD15.unet_config | {
        "in_channels": 8, "adm_in_channels": 768, "num_classes": "sequential", "use_linear_in_transformer": True,
        "use_temporal_attention": True, "use_temporal_resblock": True, "extra_ff_mix_layer": True,
        "use_spatial_context": True, "merge_strategy": "learned_with_images", "merge_factor": 0.0,
        "video_kernel_size": [3, 1, 1], "disable_temporal_crossattention": False,
        "channel_mult": [1, 2, 4], "transformer_depth": [0, 1, 1], "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    },
    extra=lambda t, g, n: {"concat_latent_image": randn(g, 1, *t.latent)},
)  # fmt: skip

UNETS = {"sd15": SD15, "sdxl": SDXL, "svd": SVD}
