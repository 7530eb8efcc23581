"""The cache whose decision asks how wrong its prediction is, and which makes up for what it got wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .extrapolation import blended, fitted_weights, newton_weights, relative_error, share_seen
from .forecast import Forecast
from .kept_residual import KeptResidual, combined, kind_of
from .residual_cache import CacheConfig, Reduce, ResidualCache, alone

Products = list[list[float]]


@dataclass(frozen=True)
class Hit:
    """A reused step. weights: of rest. measured: first was known."""

    at: float
    width: float
    weights: list[float]
    measured: bool = True


class PredictedCache(ResidualCache):
    """Decision "prediction": the question is not how much the first block changed but how wrong reusing would be.

    - `first` is known at every step at which block 0 runs. The weights of the computed steps that continue it best
      (least squares, held near the polynomial's) are found anew at each step, and the same weights continue `rest`.
    - At order 2 the polynomial is a blend of parabola and line. Which of them serves depends on the model (smooth
      random weights like the parabola, trained ones with few computed steps the line), so the share is the one that
      would have foreseen this run's last computed residuals best; it starts at the parabola, newer ones count more.
    - What that fit leaves over, relative L2, times the ratio of rest's error to first's seen at this run's own
      computed steps (a running geometric mean), is the error to expect. Since a fit can be good by accident, and far
      from the computed steps often is, the estimate is the geometric mean of this error and the plain change.
    - The estimates that were measured foresee those of later steps (`Forecast`). Where a forecast is clearly below the
      threshold (`Decision.CAUTION`), block 0 does not run: the polynomial continues `first` as well as `rest`. On the
      models that this was tried on, reusing without the fit errs by up to 9 % more at the same computed steps; what is
      saved computes a third more steps at 70 % of block calls saved with 10 blocks. The last steps are measured
      (`Step.is_last`).
    - Of what a step gets wrong the later ones make up for half and more: of one reused step alone 0.3 to 0.5 was left
      in the picture, on trained and on random weights, all along the schedule. Nothing makes up for the last step,
      so its estimate counts more (FINAL_WEIGHT).
    - The first computed step behind reused ones knows better what those should have been: it interpolates between
      computed steps where they extrapolated. Half of the difference, each step by its width, is added to its output,
      which brings the sampler back to where it would have been.

    What is compared is a sample of each residual, always where the model is: of every STRIDEth value of one with more
    than SMALL of them, at most SAMPLE.
    """

    SAMPLE = 2**20
    SMALL = 2**16
    STRIDE = 7  # at least, of a residual that is not small: a seventh tells as much, and costs less
    FINAL_WEIGHT = 2.5
    CORRECT = 0.5
    MAX_CORRECTION = 0.2  # of the residual; beyond it the model's output layer is far from linear
    MEMORY = 0.5  # of what showed the share of the parabola, from one computed step to the next
    PRIOR = 0.1  # how much the start counts beside it
    MAX_WIDTH_RATIO = 2.0  # a long step's error, put into a short step, would distort that one

    def __init__(self, config: CacheConfig, reduce: Reduce = alone) -> None:
        super().__init__(config, reduce)
        self._firsts: list[KeptResidual] = []  # of the computed steps, newest first
        self._first_samples: list[Tensor] = []
        self._rest_samples: list[Tensor] = []
        self._weights: list[float] = []
        self._leftover = 0.0  # of the fit to first, at this step
        self._log_ratio: float | None = None
        # rest's products, and the weights and first's leftover that they are to be held against
        self._unread: tuple[Tensor, list[float], float] | None = None
        self._polynomials: tuple[list[float], list[float]] = [], []  # line and parabola at the last judged step
        self._bend = self._bend_of = 0.0  # numerator and denominator of the parabola's share
        self._forecast = Forecast()
        self._hits: list[Hit] = []  # since the last computed step

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
        self._firsts, self._first_samples, self._rest_samples, self._hits = [], [], [], []
        self._weights, self._unread, self._forecast = [], None, Forecast()

    def judge(self, values: Sequence[float], at: float) -> float:
        size = len(self._first_samples) + 1
        if self._unread is not None:
            self._calibrate(_square(values[size * size :]))
        products = _square(values[: size * size])
        self._polynomials = self._line_and_parabola(at)
        self._weights = fitted_weights(self._blended(*self._polynomials), products) if self._times else [1.0]
        self._leftover = relative_error(self._weights, products)
        change = relative_error([1.0], products)
        estimate = math.sqrt(math.exp(self._log_ratio or 0.0) * self._leftover * change)
        self._forecast.learn(estimate, self._times, at)
        return estimate

    def foresee(self, at: float) -> float | None:
        return self._forecast.at(self._times, at)

    def _line_and_parabola(self, at: float) -> tuple[list[float], list[float]]:
        line, parabola = (newton_weights(self._times, at, min(order, self._order)) for order in (1, 2))
        return line, parabola

    def _blended(self, line: list[float], parabola: list[float]) -> list[float]:
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
        self._hits.append(Hit(at, width, self._weights))
        return combined(self._weights, self._rests)

    def reuse_unmeasured(self, at: float, width: float) -> Tensor:
        self.num_consecutive_hits += 1
        weights = self._blended(*self._line_and_parabola(at))
        self._hits.append(Hit(at, width, weights, measured=False))
        return combined(weights * 2, self._rests + self._firsts)

    def remember(self, first: Tensor, rest: Tensor | None, at: float, width: float) -> Tensor | None:
        # Of others the samples would be copies; ComfyUI 0.3's Wan gives such ones.
        first, rest = first.contiguous(), None if rest is None else rest.contiguous()
        self.num_consecutive_hits = 0
        comparable = rest is not None and self._rests and kind_of(rest) == self._rests[0].kind
        correction = self._correction(first, rest, at, width) if comparable and self._hits else None
        rest_sample = None if rest is None else self._sample(rest)
        if comparable and len(self._weights) == len(self._rests) > self._order:
            self._unread = (_products(rest_sample, self._rest_samples), self._weights, self._leftover)
        self._hits = []
        times = list(self._times)  # `_keep` takes a time out that is computed twice
        self._keep(rest, at)
        kept = [times.index(time) for time in self._times[1:]]
        self._firsts = [KeptResidual(first, in_host=self._in_host), *(self._firsts[place] for place in kept)]
        self._first_samples = [self._sample(first), *(self._first_samples[place] for place in kept)]
        self._rest_samples = [rest_sample, *(self._rest_samples[place] for place in kept)]
        return correction

    def _correction(self, first: Tensor, rest: Tensor, at: float, width: float) -> Tensor | None:
        """Half of what the reused steps lacked, as far as this step can see, spread over this step's width."""
        times = self._times
        if at in times or width <= 0:
            return None
        of_rest, of_first = ([0.0] * (len(times) + 1) for _ in range(2))
        for hit in self._hits:
            share = self.CORRECT * min(hit.width / width, self.MAX_WIDTH_RATIO)
            known = newton_weights([at, *times], hit.at, max(self._order, 1))
            for number, (better, used) in enumerate(zip(known, [0.0, *hit.weights], strict=True)):
                of_rest[number] += share * (better - used)
                of_first[number] += 0.0 if hit.measured else share * (better - used)
        rests, firsts = [KeptResidual(rest), *self._rests], [KeptResidual(first), *self._firsts]
        correction = combined(of_rest + of_first, rests + firsts)
        squares = torch.stack([self._sample(tensor).float().square().sum() for tensor in (correction, rest)])
        size, whole = self._reduce(squares).sqrt()
        return correction * (self.MAX_CORRECTION * whole / size).nan_to_num(0.0).clamp(max=1.0).to(correction.dtype)

    def _sample(self, residual: Tensor) -> Tensor:
        size = residual.numel()
        stride = max(-(-size // self.SAMPLE), min(size // self.SMALL, self.STRIDE), 1)
        while math.gcd(stride, residual.shape[-1]) > 1:  # else it would visit some of the channels only
            stride += 1
        sample = residual.reshape(-1)[::stride]
        # clone: of a residual that goes to CPU memory; a view would hold on to it
        return sample.clone() if self._in_host else sample

    @property
    def num_bytes(self) -> int:
        whole = [kept.held for kept in (*self._rests, *self._firsts)]
        storages = {held.untyped_storage().data_ptr() for held in whole}
        samples = [sample for sample in (*self._first_samples, *self._rest_samples) if sample is not None]
        own = [sample for sample in samples if sample.untyped_storage().data_ptr() not in storages]
        return sum(tensor.numel() * tensor.element_size() for tensor in (*whole, *own))


def _products(sample: Tensor, older: Sequence[Tensor]) -> Tensor:
    """Inner products (float32) of sample - newest, of each older one - newest, and of sample, with each other."""
    newest, sample = older[0].float(), sample.float()  # half precision would overflow
    rows = torch.stack([sample - newest, *(one.float() - newest for one in older[1:]), sample])
    return rows @ rows.T


def _square(values: Sequence[float]) -> Products:
    size = math.isqrt(len(values))
    return [list(values[row * size : (row + 1) * size]) for row in range(size)]
