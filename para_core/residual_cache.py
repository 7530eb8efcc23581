"""The residual of the skipped blocks for one conditioning: when it may be reused, and what it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .extrapolation import newton_weights
from .kept_residual import KeptResidual, combined, kind_of

DECISIONS = ("first_block", "prediction")
DEVICES = ("model", "cpu")
MAX_ORDER = 2
Reduce = Callable[[Tensor], Tensor]


def alone(figures: Tensor) -> Tensor:
    """The sum over a group's ranks where there is no group."""
    return figures


@dataclass(frozen=True)
class CacheConfig:
    """What the user asks of the first-block cache.

    residual_diff_threshold: reuse while the estimate stays below this; 0 never reuses, None takes the family's own.
    start_percent, end_percent: the part of the noise schedule in which reuse is allowed, 0 = pure noise, 1 = clean.
    warmup_steps: this many steps at the start of a run are always computed.
    max_consecutive_hits: after this many reused steps in a row one is computed; 0 sets no limit.
    order: of the polynomial that continues the residual over the computed steps; 0 repeats the last one.
    decision: "first_block" asks how much the first block's residual has changed since the last computed step;
        "prediction" asks how wrong the continued residual is (see `PredictedCache`).
    target_speedup: instead of a threshold, the share of block calls to save, as 1 / (1 - share); 0: not used.
    residual_device: where residuals are kept between steps: "model", where the model is, or "cpu", in CPU memory.
    """

    residual_diff_threshold: float | None = None
    start_percent: float = 0.0
    end_percent: float = 1.0
    warmup_steps: int = 0
    max_consecutive_hits: int = 0
    order: int = 0
    decision: str = "first_block"
    target_speedup: float = 0.0
    residual_device: str = "model"

    def __post_init__(self) -> None:
        threshold = self.residual_diff_threshold
        if threshold is not None and not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(
                f"residual_diff_threshold is {threshold}; allowed is 0 or more. "
                "Use 0 to never reuse, 0.05 (careful) to 0.15 (fast), or in the node -1 for the model's own value."
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
        if self.order not in range(MAX_ORDER + 1):
            raise ValueError(f"order is {self.order}; allowed are 0 (repeat), 1 (straight line) and 2 (parabola).")
        if self.decision not in DECISIONS:
            raise ValueError(f'decision is "{self.decision}"; allowed are {" and ".join(DECISIONS)}.')
        if self.residual_device not in DEVICES:
            raise ValueError(f'residual_device is "{self.residual_device}"; allowed are {" and ".join(DEVICES)}.')
        if self.target_speedup and not (math.isfinite(self.target_speedup) and self.target_speedup >= 1):
            raise ValueError(f"target_speedup is {self.target_speedup}; allowed is 1 or more. Use 0 for a threshold.")
        if self.target_speedup and threshold is not None:
            raise ValueError(
                f"target_speedup {self.target_speedup:g} and residual_diff_threshold {threshold:g} exclude each other; "
                "leave one of them at its default (0 and -1)."
            )


class ResidualCache:
    """What one conditioning's computed steps left behind: the published first-block cache, and its continuation.

    Everywhere: first is block 0's residual, rest the residual of all blocks behind it, both in the shape of the cached
    tokens, (B, S, D) for most models, in the model's dtype. They belong to this object once remembered: the caller
    must not write into them. at: the time of a step, in the variable that the model is conditioned on; width: its
    distance to the next step.

    On the ranks of a group each cache sees some of the tokens, or none. What it measures are sums over tokens; `reduce`
    adds up a small tensor over the ranks, so that the caches of one conditioning go through the same states everywhere.
    """

    FINAL_WEIGHT = 1.0  # of the estimate at a run's last step

    def __init__(self, config: CacheConfig, reduce: Reduce = alone) -> None:
        self.num_consecutive_hits = 0
        self._reduce = reduce
        self._order = config.order
        self._in_host = config.residual_device == "cpu"
        self._times: list[float] = []  # of the computed steps, newest first
        self._rests: list[KeptResidual] = []
        self._first: KeptResidual | None = None
        self._first_sum_abs: Tensor | None = None

    def measure(self, first: Tensor) -> Tensor | None:
        """What `judge` needs of this step's first residual: a float32 vector on the device, of sums over tokens.

        Here sum|first - previous| and sum|previous|, previous being the last computed step's.
        None when there is nothing to compare with: nothing remembered yet, or another size, dtype or device.
        """
        previous = self._first
        if previous is None or kind_of(first) != previous.kind:
            return None
        return torch.stack(((first - previous.tensor()).abs_().sum(dtype=torch.float32), self._first_sum_abs))

    def figures(self, first: Tensor) -> Tensor:
        """What `measure` gives, in the same length on every rank: NaN where this one cannot compare, which makes the
        sum over the ranks NaN; empty where nothing is remembered."""
        measured = self.measure(first)
        return first.new_full((self._num_figures,), math.nan, dtype=torch.float32) if measured is None else measured

    @property
    def _num_figures(self) -> int:
        return 0 if self._first is None else 2

    def estimate(self, values: Sequence[float], at: float) -> float | None:
        """What `judge` says of the host's copy of the summed `figures`; where they are not finite nothing stays."""
        if not values:
            return None
        if not all(map(math.isfinite, values)):
            self._forget()
            return None
        return self.judge(values, at)

    def judge(self, values: Sequence[float], at: float) -> float:
        """The estimate that is held against the threshold, from the host's copy of what `measure` gave.

        Here the relative L1 distance: mean|first - previous| / mean|previous|. What was and is nothing has not changed.
        """
        change, size = values
        return change / size if size > 0 else math.inf if change > 0 else 0.0

    def allows_hit(self, max_consecutive_hits: int) -> bool:
        """Whether there is something to reuse, and fewer than `max_consecutive_hits` (0: no limit) went before."""
        return bool(self._rests) and not 0 < max_consecutive_hits <= self.num_consecutive_hits

    def reuse(self, at: float, width: float) -> Tensor:
        """The residual of the skipped blocks for one reused step, read-only: continued to `at`."""
        self.num_consecutive_hits += 1
        return combined(newton_weights(self._times, at, self._order), self._rests)

    def foresee(self, at: float) -> float | None:
        """The estimate to expect at a time without measuring it; None: it has to be measured."""
        return None

    def fits(self, tokens: Tensor) -> bool:
        """Whether the kept residuals are of the kind of these tokens."""
        return bool(self._rests) and kind_of(tokens) == self._rests[0].kind

    def reuse_unmeasured(self, at: float, width: float) -> Tensor:
        """The residual of all blocks, block 0 included, for a step at which none runs; only where `foresee` allows."""
        raise NotImplementedError

    def remember(self, first: Tensor, rest: Tensor | None, at: float, width: float) -> Tensor | None:
        """Keep a computed step's residuals; `rest` None only keeps what later steps are compared with.

        Returns what is to be added to this step's output, in the shape of rest, or None.
        """
        self.num_consecutive_hits = 0
        self._first = KeptResidual(first, in_host=self._in_host)
        self._first_sum_abs = first.abs().sum(dtype=torch.float32)
        self._keep(rest, at)
        return None

    def _keep(self, rest: Tensor | None, at: float) -> None:
        if rest is None or (self._rests and kind_of(rest) != self._rests[0].kind):
            self._times, self._rests = [], []
        if rest is None:
            return
        if at in self._times:  # samplers that evaluate a time twice: the later one counts
            place = self._times.index(at)
            del self._times[place], self._rests[place]
        self._times = [at, *self._times][: self._order + 1]
        self._rests = [KeptResidual(rest, in_host=self._in_host), *self._rests][: self._order + 1]

    def _forget(self) -> None:
        self._times, self._rests, self._first = [], [], None

    @property
    def num_bytes(self) -> int:
        """Held for residuals, wherever they are kept."""
        kept = [*self._rests, *([] if self._first is None else [self._first])]
        return sum(residual.held.numel() * residual.held.element_size() for residual in kept)
