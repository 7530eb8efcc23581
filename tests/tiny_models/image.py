"""Tiny image models with transformers."""

from __future__ import annotations

from dataclasses import replace

import torch

from .flux import CHROMA, FLUX, FLUX2, KONTEXT, LONGCAT, OVIS, RADIANCE
from .tiny_model import TinyModel, padded, randn

SD3 = TinyModel(
    "SD3 and 3.5", "sd3", "SD3",
    {
        "in_channels": 16, "patch_size": 2, "depth": 2, "num_blocks": 4, "input_size": None, "adm_in_channels": 64,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 128}},
        "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "qk_norm": "rms",
        "x_block_self_attn_layers": [0],
    },
    latent=(16, 10, 14), pooled_dim=64, buffers=("pos_embed",),
)  # fmt: skip

QWEN_IMAGE = TinyModel(
    "Qwen-Image", "qwen_image", "QwenImage",
    {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": 4, "num_attention_heads": 2,
        "attention_head_dim": 32, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12),
    },
    latent=(16, 1, 10, 14),
)  # fmt: skip


def _qwen_edit(tiny: TinyModel, generator: torch.Generator, num_tokens: int) -> dict:
    references = [randn(generator, 1, 16, 1, 6, 10), randn(generator, 1, 16, 1, 4, 6)]
    return {"reference_latents": references, **padded(tiny, generator, num_tokens)}


QWEN_EDIT = replace(
    QWEN_IMAGE, title="Qwen-Image-Edit", extra=_qwen_edit, since_033={"default_ref_method": "index_timestep_zero"}
)

MAGE_FLOW = TinyModel(
    "Mage-Flow", "mage_flow", "MageFlow",
    {
        "image_model": "mage_flow", "in_channels": 128, "out_channels": 128, "num_layers": 4, "num_attention_heads": 2,
        "attention_head_dim": 32, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12),
    },
    latent=(128, 5, 7), since="0.33.0",
)  # fmt: skip

LENS = TinyModel(
    "Lens", "lens", "Lens",
    {
        "image_model": "lens", "in_channels": 128, "out_channels": 32, "num_layers": 4, "num_attention_heads": 2,
        "attention_head_dim": 32, "enc_hidden_dim": 32, "axes_dims_rope": (8, 12, 12), "selected_layer_index": (0, 1),
    },
    latent=(128, 5, 7), since="0.33.0",
)  # fmt: skip

JOYIMAGE = TinyModel(
    "JoyImage", "joyimage", "JoyImage",
    {
        "image_model": "joyimage", "in_channels": 16, "hidden_size": 256, "num_attention_heads": 2, "text_dim": 64,
        "num_layers": 4,
    },
    latent=(16, 1, 10, 14), extra=lambda t, g, n: {"reference_latents": [randn(g, 1, 16, 1, 6, 10)]}, since="0.33.0",
)  # fmt: skip

AURA_FLOW = TinyModel(
    "AuraFlow", "aura_flow", "AuraFlow",
    {"dim": 64, "n_heads": 2, "n_double_layers": 2, "n_layers": 5, "global_conddim": 64, "cond_seq_dim": 64,
     "max_seq": 256},
    latent=(4, 10, 14),
)  # fmt: skip

LUMINA2 = TinyModel(
    "Lumina 2", "lumina2", "Lumina2",
    {
        "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 64, "n_layers": 4,
        "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 1, "qk_norm": True, "axes_dims": [16, 16, 16],
        "axes_lens": [64, 64, 64], "multiple_of": 32, "ffn_dim_multiplier": 1.0,
    },
    # Without padding: ComfyUI 0.3.64 itself fails on a padded prompt in a batch.
    latent=(16, 10, 14), extra=lambda t, g, n: {"attention_mask": torch.ones(1, n, dtype=torch.long)},
)  # fmt: skip

Z_IMAGE = replace(
    LUMINA2, title="Z-Image", config="ZImage", since="0.33.0",
    unet_config=LUMINA2.unet_config | {
        "dim": 256, "n_heads": 8, "n_kv_heads": 8, "axes_dims": [8, 12, 12], "z_image_modulation": True,
        "time_scale": 1000.0, "pad_tokens_multiple": 8,
    },
)  # fmt: skip

Z_IMAGE_PIXEL = replace(
    Z_IMAGE, title="Z-Image in pixels", config="ZImagePixelSpace", latent=(3, 20, 28),
    unet_config=Z_IMAGE.unet_config | {
        "image_model": "zimage_pixel", "in_channels": 3, "patch_size": 4, "decoder_hidden_size": 32,
        "decoder_num_res_blocks": 1, "decoder_max_freqs": 4,
    },
)  # fmt: skip

OMNIGEN2 = TinyModel(
    "OmniGen2", "omnigen2", "Omnigen2",
    {
        "image_model": "omnigen2", "hidden_size": 64, "num_layers": 4, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32, "axes_dim_rope": (8, 12, 12),
        "axes_lens": (64, 64, 64), "text_feat_dim": 64,
    },
    latent=(16, 10, 14),
    # Without padding the mask only tells the host the number of text tokens.
    extra=lambda t, g, n: {
        "attention_mask": torch.ones(1, n, dtype=torch.long), "reference_latents": [randn(g, 1, 16, 6, 10)]
    },
)  # fmt: skip

HIDREAM = TinyModel(
    "HiDream-I1", "hidream", "HiDream",
    {
        "image_model": "hidream", "patch_size": 2, "in_channels": 16, "out_channels": 16, "num_layers": 2,
        "num_single_layers": 3, "attention_head_dim": 32, "num_attention_heads": 2, "caption_channels": [64, 64],
        "text_emb_dim": 64, "num_routed_experts": 2, "num_activated_experts": 1, "axes_dims_rope": (8, 12, 12),
        "max_resolution": (32, 32), "llama_layers": [0, 1, 1, 0, 1],
    },
    latent=(16, 10, 14), pooled_dim=64, extra=lambda t, g, n: {"conditioning_llama3": randn(g, 1, 2, n + 2, 64)},
)  # fmt: skip

KREA2 = TinyModel(
    "Krea 2", "krea2", "Krea2",
    {
        "image_model": "krea2", "features": 64, "tdim": 64, "txtdim": 32, "heads": 2, "kvheads": 1, "layers": 4,
        "txtlayers": 2, "txtheads": 2, "txtkvheads": 2, "patch": 2, "channels": 16, "default_ref_method": "index",
    },
    latent=(16, 1, 10, 14), extra=lambda t, g, n: {"reference_latents": [randn(g, 1, 16, 1, 6, 10)]}, since="0.33.0",
)  # fmt: skip

ERNIE = TinyModel(
    "ERNIE-Image", "ernie", "ErnieImage",
    {
        "image_model": "ernie", "hidden_size": 64, "num_attention_heads": 2, "num_layers": 4, "ffn_hidden_size": 128,
        "in_channels": 128, "out_channels": 128, "text_in_dim": 48, "rope_axes_dim": (8, 12, 12),
    },
    latent=(128, 5, 7), context_dim=48, since="0.33.0",
)  # fmt: skip


def _small_adapter(model: torch.nn.Module) -> None:
    """In place of one of 100 million weights."""
    import comfy.ops
    from comfy.ldm.anima.model import LLMAdapter

    operations = comfy.ops.disable_weight_init
    model.llm_adapter = LLMAdapter(64, 64, 64, num_layers=1, num_heads=2, operations=operations)
    model.llm_adapter.embed = operations.Embedding(NUM_IDS, 64)


NUM_IDS = 50


def _token_ids(tiny: TinyModel, generator: torch.Generator, num_tokens: int) -> dict:
    ids = torch.randint(NUM_IDS, (num_tokens,), generator=generator)
    return {"t5xxl_ids": ids, "t5xxl_weights": 0.5 + torch.rand(num_tokens, generator=generator)}


COSMOS_PREDICT2 = TinyModel(
    "Cosmos Predict 2", "cosmos_predict2", "CosmosT2IPredict2",
    {
        "image_model": "cosmos_predict2", "max_img_h": 64, "max_img_w": 64, "max_frames": 16, "in_channels": 16,
        "out_channels": 16, "patch_spatial": 2, "patch_temporal": 1, "concat_padding_mask": True,
        "model_channels": 64, "num_blocks": 4, "num_heads": 2, "crossattn_emb_channels": 64, "pos_emb_cls": "rope3d",
        "pos_emb_learnable": True, "use_adaln_lora": True, "adaln_lora_dim": 16, "rope_enable_fps_modulation": False,
    },
    latent=(16, 1, 10, 14),
)  # fmt: skip

ANIMA = replace(
    COSMOS_PREDICT2, title="Anima", config="Anima", shrink=_small_adapter, extra=_token_ids, since="0.33.0",
    unet_config=COSMOS_PREDICT2.unet_config | {"image_model": "anima"},
)  # fmt: skip

KANDINSKY5_IMAGE = TinyModel(
    "Kandinsky 5 image", "kandinsky5", "Kandinsky5Image",
    {
        "image_model": "kandinsky5", "in_visual_dim": 16, "out_visual_dim": 16, "in_text_dim": 64, "in_text_dim2": 64,
        "time_dim": 32, "model_dim": 64, "ff_dim": 128, "visual_embed_dim": 64, "num_text_blocks": 1,
        "num_visual_blocks": 4, "axes_dims": (8, 12, 12),
    },
    latent=(16, 10, 14), pooled_dim=64, since="0.33.0",
)  # fmt: skip

HUNYUAN_IMAGE = TinyModel(
    "HunyuanImage 2.1", "hunyuan_video", "HunyuanImage21",
    {
        "image_model": "hunyuan_video", "in_channels": 64, "out_channels": 64, "patch_size": [1, 1],
        "vec_in_dim": None, "context_in_dim": 64, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 3, "axes_dim": [16, 16], "theta": 256, "qkv_bias": True, "guidance_embed": False,
        "byt5": False, "meanflow": False,
    },
    latent=(64, 5, 7), since_033={"use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False},
)  # fmt: skip

IMAGE = {
    "flux": FLUX, "kontext": KONTEXT, "flux2": FLUX2, "longcat": LONGCAT, "ovis": OVIS, "chroma": CHROMA,
    "radiance": RADIANCE, "sd3": SD3, "qwen_image": QWEN_IMAGE, "qwen_edit": QWEN_EDIT, "mage_flow": MAGE_FLOW,
    "lens": LENS, "joyimage": JOYIMAGE, "aura_flow": AURA_FLOW, "lumina2": LUMINA2, "z_image": Z_IMAGE,
    "z_image_pixel": Z_IMAGE_PIXEL, "omnigen2": OMNIGEN2, "hidream": HIDREAM, "krea2": KREA2, "ernie": ERNIE,
    "cosmos_predict2": COSMOS_PREDICT2, "anima": ANIMA, "kandinsky5_image": KANDINSKY5_IMAGE,
    "hunyuan_image": HUNYUAN_IMAGE,
}  # fmt: skip
