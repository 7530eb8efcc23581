"""The residual of the skipped blocks for one conditioning: when it may be reused, and what it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheConfig:
    """What the user asks of the first-block cache.

    residual_diff_threshold: reuse while the first block's residual has changed by less than this, relative L1;
        0 never reuses, None takes the model family's own value.
    start_percent, end_percent: the part of the noise schedule in which reuse is allowed, 0 = pure noise, 1 = clean.
    warmup_steps: this many steps at the start of a run are always computed.
    max_consecutive_hits: after this many reused steps in a row one is computed; 0 sets no limit.
    """

    residual_diff_threshold: float | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0
    warmup_steps: int = 0
    max_consecutive_hits: int = 0

    def __post_init__(self) -> None:
        threshold = self.residual_diff_threshold
        if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(
                f"residual_diff_threshold is {threshold}; allowed is 0 or more. "
                "Use 0 to never reuse, or about 0.05 (careful) to 0.15 (fast)."
            )
        if not 0 <= self.start_percent <= self.end_percent <= 1:
            raise ValueError(
                f"start_percent {self.start_percent} and end_percent {self.end_percent} do not make a range; "
                "allowed is 0 <= start_percent <= end_percent <= 1. Use 0 and 1 for the whole run."
            )
        for name in ("warmup_steps", "max_consecutive_hits"):
            value = getattr(self, name)
            if value < 0 or value != int(value):
                raise ValueError(f"{name} is {value}; allowed are whole numbers from 0. Use 0 to switch it off.")


class ResidualCache:
    """The last computed residuals of one conditioning: of the first block, and of all blocks behind it.

    All tensors have the shape of the cached token stream, (B, S, D) for most models, in the model's dtype.
    They belong to this object once remembered: the caller must not write into them.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self.rest: Tensor | None = None
        self.num_consecutive_hits = 0
        self._first_mean_abs: Tensor | None = None

    def diff(self, first: Tensor) -> Tensor | None:
        """Relative L1 distance of a first-block residual from the last computed step's, a float32 scalar tensor.

        mean|first - previous| / mean|previous|, as in ParaAttention's published description of the first block cache.
        None when there is nothing to compare with: nothing remembered yet, or another size, dtype or device.
        """
        previous = self.first
        if previous is None or first.shape != previous.shape or first.dtype != previous.dtype:
            return None
        if first.device != previous.device:
            return None
        return (first - previous).abs_().mean(dtype=torch.float32) / self._first_mean_abs

    def allows_hit(self, max_consecutive_hits: int) -> bool:
        """Whether there is something to reuse, and fewer than `max_consecutive_hits` (0: no limit) went before."""
        return self.rest is not None and not 0 < max_consecutive_hits <= self.num_consecutive_hits

    def remember(self, first: Tensor, rest: Tensor | None) -> None:
        """Keep a computed step's residuals; `rest` None only keeps what later steps are compared with."""
        self.first, self.rest = first, rest
        self._first_mean_abs = first.abs().mean(dtype=torch.float32)
        self.num_consecutive_hits = 0

    def reuse(self) -> Tensor:
        """The residual of the skipped blocks, for one reused step; read-only."""
        assert self.rest is not None
        self.num_consecutive_hits += 1
        return self.rest

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.first, self.rest) if tensor is not None)
