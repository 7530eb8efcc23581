"""The state of one sampling run with the cache: what each conditioning left behind, and the numbers of the run."""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Protocol

from .between_blocks import jumped
from .budget import Budget
from .cache_report import RunReport, StepRecord
from .call_clock import CallClock
from .families import ModelFamily
from .first_block import CachedCall
from .predicted_cache import PredictedCache
from .residual_cache import CacheConfig, Reduce, ResidualCache, alone
from .row_chunks import RowChunks
from .run_state import RunState, Step


class Decided(Protocol):
    """What became of a model call. measured: block 0 has run; diffs: an estimate for each conditioning, if any."""

    decided: bool
    reuses: bool
    measured: bool
    diffs: Sequence[float | None]


@dataclass
class ComputedCall:
    """A model call that the cache left alone."""

    diffs: list[None]
    decided: bool = True
    reuses: bool = False
    measured: bool = True


class CacheRun(RunState):
    """The state of one sampling run: a residual cache per conditioning, and what was done.

    Made when sampling starts and dropped when it ends; nothing outlives it. Conditionings are told apart by the keys
    that the adapter gives (conditioning id, context window, model, ...); the rows of a batch are cut accordingly,
    so that residuals stay apart however the host batches.
    """

    # States that no step has touched for this long belong to passes that ended (another pack's short-lived patches).
    STALE_STEPS = 4
    CACHES = {"first_block": ResidualCache, "prediction": PredictedCache}
    # Errors of a prediction are smaller than the changes that families' thresholds speak of.
    DEFAULT_SHARE = {"first_block": 1.0, "prediction": 0.5}

    def __init__(
        self, family: ModelFamily, config: CacheConfig, *, reduce: Reduce = alone, rounding: float = 0.0
    ) -> None:
        """rounding: how coarsely the model rounds activations (`Scheme.rounding`); shifts the default threshold."""
        threshold = config.residual_diff_threshold
        self.family = family
        default = family.threshold_for(rounding) * self.DEFAULT_SHARE[config.decision]
        super().__init__(config, default if threshold is None else threshold, reduce)
        self._budgets: dict[tuple[Hashable, ...], Budget] = {}  # of conditionings that are evaluated together
        self._caches: dict[Hashable, tuple[ResidualCache, ...]] = {}  # of a conditioning: one per cached stream
        self._last_step: dict[Hashable, Step] = {}
        self._controlled: dict[Hashable, tuple[float, ...]] = {}  # at the last computed call
        self._labels: dict[Hashable, str] = {}
        self._records: dict[str, list[StepRecord]] = {}
        self._num_calls = {False: 0, True: 0}
        self._clock = CallClock()
        self._num_block_calls = 0
        self._num_block_calls_baseline = 0
        self._lock = threading.Lock()  # the host's MultiGPU CFG Split calls the model from a thread for each device
        self._started: float | None = None  # the first model call; loading the model is not the cache's time

    @contextmanager
    def call(
        self,
        family: ModelFamily,
        num_blocks: Sequence[int],
        conditionings: Mapping[Hashable, str],
        step: Step,
        *,
        here: slice | None = None,
    ) -> Iterator[CachedCall]:
        """One model call over a batch whose equal row chunks are `conditionings` (key to name), in order.

        num_blocks: blocks of each of the family's stacks. here: those whose rows this rank has, where others have the
        rest.
        """
        with self._lock:
            caches = [self._cache(key, step, len(family.cached)) for key in conditionings]
            budget = self._budget(tuple(conditionings), sum(num_blocks))
        rows = RowChunks(len(conditionings), here)
        call = CachedCall(self, family, num_blocks, list(zip(*caches, strict=True)), step, budget=budget, rows=rows)
        with self.noted(call, num_blocks, conditionings, step):
            yield call

    @property
    def off(self) -> bool:
        """Whether nothing can ever be reused, so that the calls need only be counted (see `counted`)."""
        return self.threshold <= 0 and not self.config.target_speedup

    def counted(
        self, num_blocks: Sequence[int], conditionings: Mapping[Hashable, str], step: Step
    ) -> AbstractContextManager[None]:
        """Within the context the model is called without the cache: no block asks, nothing is measured or kept."""
        return self.noted(ComputedCall([None] * len(conditionings)), num_blocks, conditionings, step)

    @contextmanager
    def noted(
        self, call: Decided, num_blocks: Sequence[int], conditionings: Mapping[Hashable, str], step: Step
    ) -> Iterator[None]:
        """Within the context the model is called; afterwards what `call` decided is entered into the books."""
        started = time.perf_counter()
        with self._lock:
            self._clock.begin(started)
            self._started = self._started or started
        yield
        if call.decided:
            with self._lock:
                self._clock.end(started, time.perf_counter(), reused=call.reuses)
                self._note(call, num_blocks, conditionings, step)

    def _note(
        self, call: Decided, num_blocks: Sequence[int], conditionings: Mapping[Hashable, str], step: Step
    ) -> None:
        if not call.reuses:
            self._controlled |= dict.fromkeys(conditionings, step.controlled)
        self._num_calls[call.reuses] += 1
        self._num_block_calls += int(call.measured) if call.reuses else sum(num_blocks)
        self._num_block_calls_baseline += sum(num_blocks)
        for (key, name), diff in zip(conditionings.items(), call.diffs, strict=True):
            self._records[self._label(key, name)].append(StepRecord(step.index, step.sigma, diff, call.reuses))

    def _label(self, key: Hashable, name: str) -> str:
        """`name`, numbered where several conditionings share it (regional prompts, context windows)."""
        if key not in self._labels:
            taken = sum(label.split(" #")[0] == name for label in self._labels.values())
            self._labels[key] = f"{name} #{taken + 1}" if taken else name
            self._records[self._labels[key]] = []
        return self._labels[key]

    def _cache(self, key: Hashable, step: Step, num_streams: int) -> tuple[ResidualCache, ...]:
        if key not in self._caches:
            stale = [k for k, last in self._last_step.items() if abs(step.index - last.index) > self.STALE_STEPS]
        else:  # a ControlNet that starts, ends or changes its strength: block 0 does not see that
            stale = [key] if jumped(self._controlled.get(key, step.controlled), step.controlled) else []
        for other in stale:
            del self._caches[other], self._last_step[other]
            self._controlled.pop(other, None)
        self._last_step[key] = step
        make = self.CACHES[self.config.decision]
        return self._caches.setdefault(key, tuple(make(self.config, self.reduce) for _ in range(num_streams)))

    def _budget(self, keys: tuple[Hashable, ...], num_blocks: int) -> Budget | None:
        if not self.config.target_speedup:
            return None
        if keys not in self._budgets:
            self._budgets[keys] = Budget(self.config.target_speedup, num_blocks)
        return self._budgets[keys]

    @property
    def num_bytes(self) -> int:
        """Held for residuals, here."""
        return sum(cache.num_bytes for caches in self._caches.values() for cache in caches)

    def report(self, *, num_steps: int = 0, finished: bool = True, num_bytes: int | None = None) -> RunReport:
        """What the run did so far. num_bytes: where the residuals are held elsewhere."""
        with self._lock:
            conditionings = {label: tuple(records) for label, records in self._records.items()}
        return RunReport(
            family=self.family.name,
            residual_diff_threshold=self.threshold,
            conditionings=conditionings,
            num_calls=sum(self._num_calls.values()),
            num_reused_calls=self._num_calls[True],
            num_block_calls=self._num_block_calls,
            num_block_calls_baseline=self._num_block_calls_baseline,
            seconds=time.perf_counter() - self._started if self._started else 0.0,
            computed_seconds=self._clock.seconds(reused=False),
            reused_seconds=self._clock.seconds(reused=True),
            num_bytes=self.num_bytes if num_bytes is None else num_bytes,
            num_steps=num_steps,
            finished=finished,
            decision=self.config.decision,
            target_speedup=self.config.target_speedup,
        )
