"""Measures the demo transformer: pictures of many prompts at once, and the attributes that they got right."""

from collections import defaultdict

import numpy as np
import torch

from ..checker import attribute_accuracy
from ..prompt import encode
from ..sampling import decode, denoise, noise
from ..scene import Scene


@torch.no_grad()
def sample_pictures(
    transformer: torch.nn.Module, autoencoder: torch.nn.Module, prompts: list[str], *, seed: int
) -> torch.Tensor:
    """Return one picture for each prompt, (B, 128, 128, 3) float32 in 0..1; prompts of equal length run together."""
    encoded = [encode(prompt) for prompt in prompts]
    groups = defaultdict(list)
    for index, (context, _) in enumerate(encoded):
        groups[context.shape[1]].append(index)
    tokens = noise(len(prompts), seed)
    for indices in groups.values():
        context, pooled = (torch.cat(parts) for parts in zip(*(encoded[i] for i in indices), strict=True))
        tokens[indices] = denoise(transformer, tokens[indices], context, pooled)
    return decode(autoencoder, tokens)


def measure(prompts: list[str], pictures: torch.Tensor) -> float:
    """Return the mean attribute accuracy of pictures, (B, H, W, 3) in 0..1, against their prompts."""
    pairs = zip(prompts, pictures.numpy(), strict=True)
    return float(np.mean([attribute_accuracy(Scene.parse(prompt), picture) for prompt, picture in pairs]))
