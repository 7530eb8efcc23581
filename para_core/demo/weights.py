"""The demo model's weights: their files, their shapes, and the way between ComfyUI's key layout and diffusers'."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny, FluxTransformer2DModel

StateDict = dict[str, torch.Tensor]

MODELS = Path(__file__).parent / "models"
TRANSFORMER_FILE = MODELS / "diffusion_models" / "para_demo_flux.safetensors"
AUTOENCODER_FILE = MODELS / "vae" / "para_demo_taesd.safetensors"

HIDDEN_SIZE = 256
NUM_HEADS = 2
DEPTH = 3
DEPTH_SINGLE = 7
CONTEXT_DIM = 64
POOLED_DIM = 64
LATENT_CHANNELS = 16
LATENT_SIZE = 16
IN_CHANNELS = LATENT_CHANNELS * 4  # patches of 2x2
# FLUX's latent format, which ComfyUI's TAESD undoes: its own latents are the model's
LATENT_SCALE, LATENT_SHIFT = 0.3611, 0.1159

_EMBEDDERS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),  # halves swapped, see _swap_halves
}
_DOUBLE_BLOCK = {
    "img_mod.lin": ("norm1.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "img_attn.norm.query_norm": ("attn.norm_q",),
    "img_attn.norm.key_norm": ("attn.norm_k",),
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "txt_attn.norm.query_norm": ("attn.norm_added_q",),
    "txt_attn.norm.key_norm": ("attn.norm_added_k",),
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_SINGLE_BLOCK = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "norm.query_norm": ("attn.norm_q",),
    "norm.key_norm": ("attn.norm_k",),
}
_BLOCKS = {
    "double_blocks": ("transformer_blocks", _DOUBLE_BLOCK),
    "single_blocks": ("single_transformer_blocks", _SINGLE_BLOCK),
}
_LEAF = {"scale": "weight"}  # the norms' parameter
_ADALN = "final_layer.adaLN_modulation.1"


def build_transformer() -> FluxTransformer2DModel:
    """Return diffusers' FLUX transformer in the demo's sizes, with fresh weights."""
    return _diffusers().FluxTransformer2DModel(
        in_channels=IN_CHANNELS,
        num_layers=DEPTH,
        num_single_layers=DEPTH_SINGLE,
        attention_head_dim=HIDDEN_SIZE // NUM_HEADS,
        num_attention_heads=NUM_HEADS,
        joint_attention_dim=CONTEXT_DIM,
        pooled_projection_dim=POOLED_DIM,
        guidance_embeds=False,
        axes_dims_rope=(16, 56, 56),
    )


def build_autoencoder() -> AutoencoderTiny:
    """Return diffusers' tiny autoencoder with 16 latent channels, with fresh weights; scaling 1, shift 0."""
    return _diffusers().AutoencoderTiny(latent_channels=LATENT_CHANNELS)


def load_transformer(dtype: torch.dtype = torch.float32) -> FluxTransformer2DModel:
    """Load the shipped transformer into diffusers' class, in eval mode.

    Raises: FileNotFoundError without the file, ImportError without diffusers.
    """
    model = build_transformer()
    return _fill(model, flux_to_diffusers(_read(TRANSFORMER_FILE)), dtype)


def load_autoencoder(dtype: torch.dtype = torch.float32) -> AutoencoderTiny:
    """Load the shipped autoencoder into diffusers' class, in eval mode; its latents are the model's own.

    Raises: FileNotFoundError without the file, ImportError without diffusers.
    """
    model = build_autoencoder()
    return _fill(model, taesd_to_diffusers(_read(AUTOENCODER_FILE)), dtype)


def save_transformer(model: FluxTransformer2DModel, metadata: dict[str, object]) -> None:
    """Write the transformer where it ships, in bfloat16 and ComfyUI's layout."""
    _write(flux_from_diffusers(model.state_dict()), TRANSFORMER_FILE, metadata)


def save_autoencoder(model: AutoencoderTiny, metadata: dict[str, object]) -> None:
    """Write the autoencoder where it ships, in bfloat16 and ComfyUI's layout."""
    _write(taesd_from_diffusers(model.state_dict()), AUTOENCODER_FILE, metadata)


def flux_to_diffusers(state_dict: StateDict) -> StateDict:
    """Rename a FLUX checkpoint's keys to diffusers' and split its fused projections, for any depth and width.

    Raises: KeyError for a key that is not FLUX's.
    """
    hidden_size = state_dict["img_in.weight"].shape[0]
    result = {}
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition(".")
        targets = _targets(module)
        value = _swap_halves(value) if module == _ADALN else value
        sizes = [hidden_size] * (len(targets) - 1)
        parts = value.split([*sizes, value.shape[0] - sum(sizes)])
        result |= {f"{target}.{_LEAF.get(leaf, leaf)}": part for target, part in zip(targets, parts, strict=True)}
    return result


def flux_from_diffusers(state_dict: StateDict) -> StateDict:
    """Rename diffusers' FLUX keys to the original layout and fuse its projections, for any depth and width."""
    result = {}
    for module, targets in _all_modules(state_dict):
        for leaf in ("weight", "bias"):
            parts = [state_dict[f"{target}.{leaf}"] for target in targets if f"{target}.{leaf}" in state_dict]
            if parts:
                value = _swap_halves(parts[0]) if module == _ADALN else torch.cat(parts)
                result[f"{module}.{'scale' if module.endswith('_norm') else leaf}"] = value
    return result


def taesd_to_diffusers(state_dict: StateDict) -> StateDict:
    """Rename the keys of a one-file TAESD to diffusers' AutoencoderTiny.

    Its decoder counts the clamp as layer 0; `vae_scale` and `vae_shift` are dropped.
    """
    result = {}
    for key, value in state_dict.items():
        if match := re.fullmatch(r"taesd_(encoder|decoder)\.(\d+)\.(.+)", key):
            part, index, rest = match.groups()
            result[f"{part}.layers.{int(index) - (part == 'decoder')}.{rest}"] = value
    return result


def taesd_from_diffusers(state_dict: StateDict) -> StateDict:
    """Rename the keys of diffusers' AutoencoderTiny to a one-file TAESD, with FLUX's scale and shift."""
    result = {"vae_scale": torch.tensor(LATENT_SCALE), "vae_shift": torch.tensor(LATENT_SHIFT)}
    for key, value in state_dict.items():
        part, _, index, rest = key.split(".", 3)
        result[f"taesd_{part}.{int(index) + (part == 'decoder')}.{rest}"] = value
    return result


def _targets(module: str) -> tuple[str, ...]:
    stack, _, rest = module.partition(".")
    if stack not in _BLOCKS:
        return _EMBEDDERS[module]
    index, _, name = rest.partition(".")
    prefix, table = _BLOCKS[stack]
    return tuple(f"{prefix}.{index}.{target}" for target in table[name])


def _all_modules(state_dict: StateDict) -> Iterator[tuple[str, tuple[str, ...]]]:
    yield from _EMBEDDERS.items()
    for stack, (prefix, table) in _BLOCKS.items():
        for index in sorted({int(key.split(".")[1]) for key in state_dict if key.startswith(f"{prefix}.")}):
            for name in table:
                yield f"{stack}.{index}.{name}", _targets(f"{stack}.{index}.{name}")


def _swap_halves(value: torch.Tensor) -> torch.Tensor:
    # FLUX's last modulation is (shift, scale), diffusers' is (scale, shift)
    return torch.cat(value.chunk(2)[::-1])


def _diffusers():
    try:
        import diffusers
    except ImportError:
        raise ImportError("the demo model needs diffusers; run: pip install diffusers") from None
    return diffusers


def _read(path: Path) -> StateDict:
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}; reinstall the package, or retrain it")
    return load_file(path)


def _fill(model, state_dict: StateDict, dtype: torch.dtype):
    # not model.to(dtype): diffusers 0.39 warns about every cast
    model.load_state_dict({key: value.to(dtype) for key, value in state_dict.items()}, assign=True)
    return model.requires_grad_(False).eval()


def _write(state_dict: StateDict, path: Path, metadata: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        key: value.detach().to(torch.bfloat16 if value.dim() else torch.float32).contiguous()
        for key, value in state_dict.items()
    }
    save_file(tensors, path, {"license": "Apache-2.0", **{key: str(value) for key, value in metadata.items()}})
