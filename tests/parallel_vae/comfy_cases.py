"""What the ranks of test_comfy_vaes.py run."""

from __future__ import annotations

import functools

import torch
from tiny_models.vaes import build_vae, decode, latent

from para_core.parallel_vae import parallel_decode


def split_decode(rank: int, world_size: int, *, title: str, dim: int | None) -> torch.Tensor:
    """The whole picture as this rank got it."""
    return parallel_decode(functools.partial(decode, build_vae(title)), latent(title), dim=dim)
