"""Draws pictures with the demo transformer: noise, plain Euler steps over linear sigmas, and the decoder."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .weights import LATENT_CHANNELS, LATENT_SIZE

NUM_STEPS = 28
SIDE = LATENT_SIZE // 2  # tokens are patches of 2x2 latents


def pack(latents: Tensor) -> Tensor:
    """Turn latents (B, C, H, W) into tokens (B, H/2 * W/2, C * 4), in FLUX's order."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: Tensor) -> Tensor:
    """Undo `pack` for the demo's square latents."""
    patches = tokens.reshape(len(tokens), SIDE, SIDE, LATENT_CHANNELS, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)


def noise(count: int, seed: int) -> Tensor:
    """Tokens of pure noise, (count, 64, 64)."""
    return torch.randn(count, SIDE * SIDE, LATENT_CHANNELS * 4, generator=torch.Generator().manual_seed(seed))


def predict(transformer: nn.Module, tokens: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
    """Call diffusers' transformer on tokens (B, 64, 64) at sigma (B,), and return the velocity."""
    img_ids = torch.zeros(SIDE, SIDE, 3)
    img_ids[..., 1] = torch.arange(SIDE)[:, None]
    img_ids[..., 2] = torch.arange(SIDE)[None]
    return transformer(
        hidden_states=tokens,
        timestep=sigma,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        txt_ids=torch.zeros(context.shape[1], 3),
        img_ids=img_ids.reshape(-1, 3),
        return_dict=False,
    )[0]


def denoise(
    transformer: nn.Module, tokens: Tensor, context: Tensor, pooled: Tensor, num_steps: int = NUM_STEPS
) -> Tensor:
    """Bring noise to clean tokens, cfg 1, sigmas linear from 1 to 0."""
    sigmas = torch.linspace(1, 0, num_steps + 1)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        velocity = predict(transformer, tokens, sigma.expand(len(tokens)), context, pooled).float()
        tokens = tokens + (following - sigma) * velocity
    return tokens


@torch.no_grad()
def decode(autoencoder: nn.Module, tokens: Tensor) -> Tensor:
    """The pictures of clean tokens, (B, 128, 128, 3) float32 in 0..1."""
    images = autoencoder.decoder(unpack(tokens)).float()
    return ((images + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1)
