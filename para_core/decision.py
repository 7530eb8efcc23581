"""Whether one model call is reused: foreseen where that is clear in advance, else measured on block 0's residuals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from .budget import Budget
from .families import Stream
from .residual_cache import ResidualCache, alone
from .row_chunks import RowChunks
from .run_state import RunState, Step


class Decision:
    """caches: of each cached stream, one for each conditioning in the batch.

    measured: block 0 runs. diffs: the estimate of each conditioning, None where there is none.
    """

    # Of the limit: how far below it the forecast of the first reused step must stay; half as far for the second, and so
    # on. Where few steps are reused, block 0 is little beside the computed ones, and measuring them is worth it.
    CAUTION = 0.2

    def __init__(
        self,
        run: RunState,
        caches: Sequence[tuple[ResidualCache, ...]],
        step: Step,
        budget: Budget | None,
        rows: RowChunks,
    ) -> None:
        self.measured, self.reuses = True, False
        self.diffs: list[float | None] = [None] * len(caches[0])
        self._run, self._caches, self._step, self._budget, self._rows = run, caches, step, budget, rows

    def foresee(self, tokens: Sequence[Tensor], streams: Sequence[Stream]) -> bool:
        """Decide, before block 0 has run on these tokens, whether it need not run at all.

        The last steps are always measured: trained models change more there than the steps before foretell.
        """
        forecasts = [cache.foresee(self._step.time) for caches in self._caches for cache in caches]
        if None in forecasts or not self._step.foreseeable or self._step.is_last or not self._allowed():
            return False
        limit = self._limit()
        if self._budget is not None and self._budget.has_room_to_measure(self._step.index, self._step.num_steps):
            return False
        hits = max(cache.num_consecutive_hits for caches in self._caches for cache in caches)
        if not max(forecasts) < (1 - self.CAUTION / (1 + hits)) * limit or not self._fit(tokens, streams):
            return False
        self.measured, self.reuses = False, True
        if self._budget is not None:
            self._budget.note(reused=True, num_blocks=0)
        return True

    @property
    def _weight(self) -> float:
        """Of an estimate."""
        return self._caches[0][0].FINAL_WEIGHT if self._step.is_final else 1.0

    def _limit(self) -> float:
        if self._budget is None:
            return self._run.threshold
        return self._budget.limit(self._step.index, self._step.num_steps)

    def _fit(self, tokens: Sequence[Tensor], streams: Sequence[Stream]) -> bool:
        """Whether the kept residuals fit the tokens; on ranks only if they do on all."""
        fits = all(
            cache.fits(chunk)
            for caches, tensor, stream in zip(self._caches, tokens, streams, strict=True)
            for cache, chunk in zip(caches, self._rows.of(tensor, stream.batch_dim), strict=True)
        )
        if self._run.reduce is alone:
            return fits
        return not self._run.reduce(tokens[0].new_full((1,), float(not fits), dtype=torch.float32)).item()

    def measure(self, residuals: Sequence[Tensor], streams: Sequence[Stream]) -> None:
        """Decide by block 0's residuals."""
        measured = [
            [
                (cache, cache.figures(chunk))
                for cache, chunk in zip(caches, self._rows.of(residual, stream.batch_dim), strict=True)
            ]
            for caches, residual, stream in zip(self._caches, residuals, streams, strict=True)
        ]
        known = torch.cat([figures for of_stream in measured for _, figures in of_stream])
        # One device sync per call, whatever the number of conditionings.
        values = iter(self._run.reduce(known).tolist() if len(known) else ())
        estimates = [
            [cache.estimate(list(islice(values, len(figures))), self._step.time) for cache, figures in of_stream]
            for of_stream in measured
        ]
        self.diffs = [None if None in of_one else self._weight * max(of_one) for of_one in zip(*estimates, strict=True)]
        possible = None not in self.diffs and self._allowed()
        self.reuses = possible and all(diff < self._run.threshold for diff in self.diffs)
        if self._budget is not None:
            estimate = max(self.diffs) if possible else None
            self.reuses = self._budget.allows_reuse(estimate, self._step.index, self._step.num_steps)
            self._budget.note(reused=self.reuses)

    def _allowed(self) -> bool:
        config = self._run.config
        return (
            self._step.allowed
            and self._step.index >= config.warmup_steps
            and all(cache.allows_hit(config.max_consecutive_hits) for caches in self._caches for cache in caches)
        )
