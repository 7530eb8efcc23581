"""What the tests of residuals share: both kinds of cache, and a measured step."""

from __future__ import annotations

import pytest
import torch

from para_core.predicted_cache import PredictedCache
from para_core.residual_cache import ResidualCache

BOTH = pytest.mark.parametrize("kind", [ResidualCache, PredictedCache])


def estimate(cache: ResidualCache, first: torch.Tensor, at: float = 0.5) -> float | None:
    """What the cache says of this residual of the first block at this time; None without one before."""
    figures = cache.measure(first)
    return None if figures is None else cache.judge(figures.tolist(), at)
