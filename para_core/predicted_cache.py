"""The cache whose decision asks how wrong its prediction is, and which makes up for what it got wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .extrapolation import blended, fitted_weights, newton_weights, relative_error, share_seen
from .kept_residual import KeptResidual, combined, kind_of
from .residual_cache import CacheConfig, Reduce, ResidualCache, alone

Products = list[list[float]]


class PredictedCache(ResidualCache):
    """Decision "prediction": the question is not how much the first block changed but how wrong reusing would be.

    - `first` is known at every step. The weights of the computed steps that continue it best (least squares, held
      near the polynomial's) are found anew at each step, and the same weights continue `rest`.
    - At order 2 the polynomial is a blend of parabola and line. Which of them serves depends on the model (smooth
      random weights like the parabola, trained ones with few computed steps the line), so the share is the one that
      would have foreseen this run's last computed residuals best; it starts at the parabola, newer ones count more.
    - What that fit leaves over, relative L2, times the ratio of rest's error to first's seen at this run's own
      computed steps (a running geometric mean), is the error to expect. Since a fit can be good by accident, and far
      from the computed steps often is, the estimate is the geometric mean of this error and the plain change.
    - The first computed step behind reused ones knows better what those should have been: it interpolates between
      computed steps where they extrapolated. Half of the difference, each step by its width, is added to its output,
      which brings the sampler back to where it would have been.

    What is compared is a sample of at most SAMPLE values of each residual, always where the model is; `rest` alone is
    kept whole.
    """

    SAMPLE = 2**20
    CORRECT = 0.5
    MAX_CORRECTION = 0.2  # of the residual; beyond it the model's output layer is far from linear
    MEMORY = 0.5  # of what showed the share of the parabola, from one computed step to the next
    PRIOR = 0.1  # how much the start counts beside it
    MAX_WIDTH_RATIO = 2.0  # a long step's error, put into a short step, would distort that one

    def __init__(self, config: CacheConfig, reduce: Reduce = alone) -> None:
        super().__init__(config, reduce)
        self._first_samples: list[Tensor] = []  # of the computed steps, newest first
        self._rest_samples: list[Tensor] = []
        self._weights: list[float] = []
        self._leftover = 0.0  # of the fit to first, at this step
        self._log_ratio: float | None = None
        # rest's products, and the weights and first's leftover that they are to be held against
        self._unread: tuple[Tensor, list[float], float] | None = None
        self._polynomials: tuple[list[float], list[float]] = [], []  # line and parabola at the last judged step
        self._bend = self._bend_of = 0.0  # numerator and denominator of the parabola's share
        self._hits: list[
            tuple[float, float, list[float]]
        ] = []  # reused since the last computed step: at, width, weights

    def measure(self, first: Tensor) -> Tensor | None:
        """Inner products of this step's sample with the computed ones', and of the last computed step's rest."""
        sample = self._sample(first)
        if not self._first_samples or kind_of(sample) != kind_of(self._first_samples[0]):
            self._weights = []
            return None
        products = _products(sample, self._first_samples).flatten()
        return products if self._unread is None else torch.cat((products, self._unread[0].flatten()))

    @property
    def _num_figures(self) -> int:
        size = len(self._first_samples)
        return ((size + 1) ** 2 if size else 0) + (0 if self._unread is None else self._unread[0].numel())

    def _forget(self) -> None:
        super()._forget()
        self._first_samples, self._rest_samples, self._weights, self._unread, self._hits = [], [], [], None, []

    def judge(self, values: Sequence[float], at: float) -> float:
        size = len(self._first_samples) + 1
        if self._unread is not None:
            self._calibrate(_square(values[size * size :]))
        products = _square(values[: size * size])
        self._weights = fitted_weights(self._polynomial(at), products) if self._times else [1.0]
        self._leftover = relative_error(self._weights, products)
        change = relative_error([1.0], products)
        return math.sqrt(math.exp(self._log_ratio or 0.0) * self._leftover * change)

    def _polynomial(self, at: float) -> list[float]:
        line, parabola = (newton_weights(self._times, at, min(order, self._order)) for order in (1, 2))
        self._polynomials = line, parabola
        share = (self._bend + self.PRIOR) / (self._bend_of + self.PRIOR)
        return blended(line, parabola, min(max(share, 0.0), 1.0))

    def _calibrate(self, products: Products) -> None:
        _, weights, leftover = self._unread
        bend, bend_of = share_seen(*self._polynomials, products)
        self._bend, self._bend_of = self.MEMORY * self._bend + bend, self.MEMORY * self._bend_of + bend_of
        error = relative_error(weights, products)
        self._unread = None
        if error > 0 and leftover > 0:
            seen = math.log(error / leftover)
            self._log_ratio = seen if self._log_ratio is None else (self._log_ratio + seen) / 2

    def reuse(self, at: float, width: float) -> Tensor:
        self.num_consecutive_hits += 1
        self._hits.append((at, width, self._weights))
        return combined(self._weights, self._rests)

    def remember(self, first: Tensor, rest: Tensor | None, at: float, width: float) -> Tensor | None:
        self.num_consecutive_hits = 0
        comparable = rest is not None and self._rests and kind_of(rest) == self._rests[0].kind
        correction = self._correction(rest, at, width) if comparable and self._hits else None
        rest_sample = None if rest is None else self._sample(rest)
        if comparable and len(self._weights) == len(self._rests) > self._order:
            self._unread = (_products(rest_sample, self._rest_samples), self._weights, self._leftover)
        self._hits = []
        times = self._times
        self._keep(rest, at)
        kept = [times.index(time) for time in self._times[1:]]
        self._first_samples = [self._sample(first), *(self._first_samples[place] for place in kept)]
        self._rest_samples = [rest_sample, *(self._rest_samples[place] for place in kept)]
        return correction

    def _correction(self, rest: Tensor, at: float, width: float) -> Tensor | None:
        """Half of what the reused steps lacked, as far as this step can see, spread over this step's width."""
        times, rests = self._times, self._rests
        if at in times or width <= 0:
            return None
        total = [0.0] * (len(rests) + 1)
        for hit_at, hit_width, weights in self._hits:
            share = self.CORRECT * min(hit_width / width, self.MAX_WIDTH_RATIO)
            known = newton_weights([at, *times], hit_at, max(self._order, 1))
            for number, (better, used) in enumerate(zip(known, [0.0, *weights], strict=True)):
                total[number] += share * (better - used)
        correction = combined(total, [KeptResidual(rest), *rests])
        squares = torch.stack([self._sample(tensor).float().square().sum() for tensor in (correction, rest)])
        size, of_rest = self._reduce(squares).sqrt()
        return correction * (self.MAX_CORRECTION * of_rest / size).nan_to_num(0.0).clamp(max=1.0).to(correction.dtype)

    def _sample(self, residual: Tensor) -> Tensor:
        # An odd stride visits all channels, whatever their number.
        stride = -(-residual.numel() // self.SAMPLE) | 1
        flat = residual.reshape(-1)
        return flat if stride == 1 else flat[::stride].clone()  # clone: a view would keep the whole residual

    @property
    def num_bytes(self) -> int:
        own = [sample for sample in (*self._first_samples, *self._rest_samples) if sample is not None]
        shared = {rest.held.untyped_storage().data_ptr() for rest in self._rests}
        samples = sum(t.numel() * t.element_size() for t in own if t.untyped_storage().data_ptr() not in shared)
        return super().num_bytes + samples


def _products(sample: Tensor, older: Sequence[Tensor]) -> Tensor:
    """Inner products (float32) of sample - newest, of each older one - newest, and of sample, with each other."""
    newest = older[0]
    rows = torch.stack([sample - newest, *(one - newest for one in older[1:]), sample]).float()
    return rows @ rows.T


def _square(values: Sequence[float]) -> Products:
    size = math.isqrt(len(values))
    return [list(values[row * size : (row + 1) * size]) for row in range(size)]
