"""Tiny video models with transformers, Wan excepted."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

from .tiny_model import TinyModel, padded, randn

HUNYUAN_VIDEO = TinyModel(
    "HunyuanVideo", "hunyuan_video", "HunyuanVideo",
    {
        "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2],
        "vec_in_dim": 64, "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 3, "axes_dim": [8, 12, 12], "theta": 256, "qkv_bias": True, "guidance_embed": True,
        "byt5": False, "meanflow": False,
    },
    latent=(16, 3, 6, 10), pooled_dim=64,
    since_033={"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False},
)  # fmt: skip

HUNYUAN_VIDEO15 = TinyModel(
    "HunyuanVideo 1.5", "hunyuan_video", "HunyuanVideo15",
    HUNYUAN_VIDEO.unet_config | {
        "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "vec_in_dim": None, "guidance_embed": False,
        "depth": 4, "depth_single_blocks": 0, "use_cond_type_embedding": True, "vision_in_dim": 64,
        "meanflow_sum": True,
    },
    latent=(32, 3, 3, 5), pooled_dim=8, since="0.33.0",
    extra=lambda t, g, n: {"clip_vision_output": SimpleNamespace(last_hidden_state=randn(g, 1, 5, 64))},
)  # fmt: skip

LTXV = TinyModel(
    "LTX-Video", "ltxv", "LTXV",
    {
        "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 64, "attention_head_dim": 32,
        "num_attention_heads": 2, "caption_channels": 64, "num_layers": 4,
    },
    latent=(128, 3, 3, 5), extra=padded,
)  # fmt: skip

LTXAV = TinyModel(
    "LTX-AV", "ltxav", "LTXAV",
    LTXV.unet_config | {
        "image_model": "ltxav", "audio_in_channels": 128, "audio_cross_attention_dim": 32,
        "audio_attention_head_dim": 16, "audio_num_attention_heads": 2, "connector_attention_head_dim": 16,
        "connector_num_attention_heads": 2, "connector_num_layers": 1,
    },
    latent=((128, 3, 3, 5), (8, 9, 16)), context_dim=128, extra=padded, since="0.33.0",
)  # fmt: skip

COSMOS = TinyModel(
    "Cosmos 1", "cosmos", "CosmosT2V",
    {
        "image_model": "cosmos", "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True,
        "model_channels": 64, "num_blocks": 4, "num_heads": 2, "crossattn_emb_channels": 64, "block_x_format": "THWBD",
        "pos_emb_cls": "rope3d", "affline_emb_norm": True, "use_adaln_lora": True, "adaln_lora_dim": 16,
        "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
    },
    latent=(16, 3, 6, 10),
)  # fmt: skip

MOCHI = TinyModel(
    "Mochi 1", "mochi", "GenmoMochi",
    {
        "image_model": "mochi_preview", "depth": 3, "patch_size": 2, "num_heads": 2, "hidden_size_x": 96,
        "hidden_size_y": 48, "mlp_ratio_x": 128.0, "mlp_ratio_y": 4.0, "in_channels": 12, "learn_sigma": False,
        "qk_norm": True, "qkv_bias": False, "out_bias": True, "patch_embed_bias": True, "timestep_mlp_bias": True,
        "attend_to_padding": False, "timestep_scale": 1000.0, "use_t5": True, "t5_feat_dim": 64,
        "t5_token_length": 16, "rope_theta": 10000.0,
    },
    latent=(12, 3, 6, 10), extra=padded,
)  # fmt: skip

KANDINSKY5 = TinyModel(
    "Kandinsky 5", "kandinsky5", "Kandinsky5",
    {
        "image_model": "kandinsky5", "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 64, "in_text_dim2": 64,
        "time_dim": 32, "model_dim": 64, "ff_dim": 128, "visual_embed_dim": 132, "num_text_blocks": 1,
        "num_visual_blocks": 4, "axes_dims": (8, 12, 12),
    },
    latent=(16, 3, 6, 10), pooled_dim=64, since="0.33.0",
)  # fmt: skip

COGVIDEOX = TinyModel(
    "CogVideoX", "cogvideox", "CogVideoX_T2V",
    {
        "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 32, "in_channels": 16,
        "out_channels": 16, "time_embed_dim": 64, "text_embed_dim": 64, "num_layers": 4,
        "use_rotary_positional_embeddings": True,
    },
    latent=(16, 3, 6, 10), since="0.33.0",
)  # fmt: skip

# Positions of a table, added to the tokens once; its size divides by 3 and 8.
COGVIDEOX_2B = replace(
    COGVIDEOX, title="CogVideoX 2B",
    unet_config=COGVIDEOX.unet_config | {"use_rotary_positional_embeddings": False, "attention_head_dim": 48},
)  # fmt: skip

VIDEO = {
    "hunyuan_video": HUNYUAN_VIDEO, "hunyuan_video15": HUNYUAN_VIDEO15, "ltxv": LTXV, "ltxav": LTXAV, "cosmos": COSMOS,
    "mochi": MOCHI, "kandinsky5": KANDINSKY5, "cogvideox": COGVIDEOX, "cogvideox_2b": COGVIDEOX_2B,
}  # fmt: skip
