"""Exact VAE decode on several ranks, each of which decodes a slice of the latent."""

from __future__ import annotations

from .decode import check_supported, obstacle, parallel_decode
from .split_call import CannotSplit

__all__ = ["CannotSplit", "check_supported", "obstacle", "parallel_decode"]
