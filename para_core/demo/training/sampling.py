"""Draws images with the demo transformer by plain Euler steps, and measures them."""

from collections import defaultdict

import torch

from ..checker import attribute_accuracy
from ..prompt import encode
from ..scene import Scene
from ..weights import LATENT_CHANNELS, LATENT_SIZE

NUM_STEPS = 28


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Turn latents (B, C, H, W) into tokens (B, H/2 * W/2, C * 4), in FLUX's order."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: torch.Tensor) -> torch.Tensor:
    """Undo `pack` for the demo's square latents."""
    side = LATENT_SIZE // 2
    patches = tokens.reshape(len(tokens), side, side, LATENT_CHANNELS, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE)


def predict(
    transformer: torch.nn.Module, tokens: torch.Tensor, sigma: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor
) -> torch.Tensor:
    """Call diffusers' transformer on tokens (B, 64, 64) at sigma (B,), and return the velocity."""
    side = LATENT_SIZE // 2
    img_ids = torch.zeros(side, side, 3)
    img_ids[..., 1] = torch.arange(side)[:, None]
    img_ids[..., 2] = torch.arange(side)[None]
    return transformer(
        hidden_states=tokens,
        timestep=sigma,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        txt_ids=torch.zeros(context.shape[1], 3),
        img_ids=img_ids.reshape(-1, 3),
        return_dict=False,
    )[0]


@torch.no_grad()
def sample_images(
    transformer: torch.nn.Module, autoencoder: torch.nn.Module, prompts: list[str], *, num_steps: int, seed: int
) -> torch.Tensor:
    """Return one image for each prompt, (B, 3, 128, 128) float32 in -1..1; cfg 1, sigmas linear from 1 to 0."""
    noise = torch.randn(len(prompts), (LATENT_SIZE // 2) ** 2, LATENT_CHANNELS * 4, generator=_generator(seed))
    encoded = [encode(prompt) for prompt in prompts]
    groups = defaultdict(list)
    for index, (context, _) in enumerate(encoded):
        groups[context.shape[1]].append(index)
    tokens = torch.empty_like(noise)
    for indices in groups.values():
        context, pooled = (torch.cat(parts) for parts in zip(*(encoded[i] for i in indices), strict=True))
        tokens[indices] = _euler(transformer, noise[indices], context, pooled, num_steps)
    return autoencoder.decoder(unpack(tokens)).float().clamp(-1, 1)


def measure(prompts: list[str], images: torch.Tensor) -> float:
    """Return the mean attribute accuracy of images, (B, 3, H, W) in -1..1, against their prompts."""
    arrays = ((images + 1) / 2).permute(0, 2, 3, 1).numpy()
    scores = [attribute_accuracy(Scene.parse(p), array) for p, array in zip(prompts, arrays, strict=True)]
    return sum(scores) / len(scores)


def _euler(transformer, tokens: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor, num_steps: int):
    sigmas = torch.linspace(1, 0, num_steps + 1)
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        velocity = predict(transformer, tokens, sigma.expand(len(tokens)), context, pooled).float()
        tokens = tokens + (following - sigma) * velocity
    return tokens


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
