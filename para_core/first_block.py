"""Drives model calls through the first-block cache: block 0 decides, the last block remembers or restores."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .cache_report import RunReport, StepRecord
from .families import BlockStack, ModelFamily, Stream
from .residual_cache import CacheConfig, ResidualCache

Result = TypeVar("Result", bound=Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor)


@dataclass(frozen=True)
class Step:
    """Where in the schedule a model call is. index counts sampler steps from 0; allowed: reuse may happen here."""

    index: int
    sigma: float
    allowed: bool = True


class CacheRun:
    """The state of one sampling run: a residual cache per conditioning, and what was done.

    Made when sampling starts and dropped when it ends; nothing outlives it. Conditionings are told apart by the keys
    that the adapter gives (conditioning id, context window, model, ...); the rows of a batch are cut accordingly,
    so that residuals stay apart however the host batches.
    """

    # States that no step has touched for this long belong to passes that ended (another pack's short-lived patches).
    STALE_STEPS = 4

    def __init__(self, family: ModelFamily, config: CacheConfig) -> None:
        threshold = config.residual_diff_threshold
        self.family = family
        self.config = config
        self.threshold = family.residual_diff_threshold if threshold is None else threshold
        self._caches: dict[Hashable, ResidualCache] = {}
        self._last_step: dict[Hashable, int] = {}
        self._labels: dict[Hashable, str] = {}
        self._records: dict[str, list[StepRecord]] = {}
        self._num_calls = {False: 0, True: 0}
        self._call_seconds = {False: 0.0, True: 0.0}
        self._num_block_calls = 0
        self._num_block_calls_baseline = 0
        self._started: float | None = None  # the first model call; loading the model is not the cache's time

    @contextmanager
    def call(
        self, family: ModelFamily, num_blocks: Sequence[int], conditionings: Mapping[Hashable, str], step: Step
    ) -> Iterator[CachedCall]:
        """One model call over a batch whose equal row chunks are `conditionings` (key to name), in order.

        num_blocks: blocks of each of the family's stacks.
        """
        caches = [self._cache(key, step.index) for key in conditionings]
        call = CachedCall(self, family, num_blocks, caches, step)
        started = time.perf_counter()
        self._started = self._started or started
        yield call
        if not call.decided:
            return
        self._num_calls[call.reuses] += 1
        self._call_seconds[call.reuses] += time.perf_counter() - started
        self._num_block_calls += 1 if call.reuses else sum(num_blocks)
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

    def _cache(self, key: Hashable, step: int) -> ResidualCache:
        if key not in self._caches:
            for stale in [k for k, last in self._last_step.items() if abs(step - last) > self.STALE_STEPS]:
                del self._caches[stale], self._last_step[stale]
        self._last_step[key] = step
        return self._caches.setdefault(key, ResidualCache())

    def report(self) -> RunReport:
        """What the run did so far."""
        return RunReport(
            family=self.family.name,
            residual_diff_threshold=self.threshold,
            conditionings={label: tuple(records) for label, records in self._records.items()},
            num_calls=sum(self._num_calls.values()),
            num_reused_calls=self._num_calls[True],
            num_block_calls=self._num_block_calls,
            num_block_calls_baseline=self._num_block_calls_baseline,
            seconds=time.perf_counter() - self._started if self._started else 0.0,
            computed_seconds=self._call_seconds[False],
            reused_seconds=self._call_seconds[True],
            num_bytes=sum(cache.num_bytes for cache in self._caches.values()),
        )


class CachedCall:
    """One forward of one model. `block` stands in for every block of the family's stacks, in execution order."""

    def __init__(
        self,
        run: CacheRun,
        family: ModelFamily,
        num_blocks: Sequence[int],
        caches: Sequence[ResidualCache],
        step: Step,
    ) -> None:
        self.decided = False
        self.reuses = False
        self.diffs: list[float | None] = [None] * len(caches)
        self._run, self._family, self._caches, self._step = run, family, caches, step
        positions = [(stack, index) for stack, count in enumerate(num_blocks) for index in range(count)]
        self._first_position, self._last_position = positions[0], positions[-1]
        self._first_residual: Tensor | None = None
        self._first_out: Tensor | None = None  # behind block 0; on a hit: the restored output
        self._num_tokens = 0

    def block(
        self, stack: int, index: int, arguments: Mapping[str, Tensor], compute: Callable[[], Result]
    ) -> Result | dict[str, Tensor] | tuple[Tensor, ...] | Tensor:
        """What block `index` of stack number `stack` returns: computed, passed through, or restored.

        arguments: at least the stack's stream arguments. compute: runs the block (and other packs' patches) on them.
        """
        position = (stack, index)
        if position == self._first_position:
            return self._first(arguments, compute)
        if self.reuses:
            return self._skip(self._family.stacks[stack], arguments, restore=position == self._last_position)
        result = compute()
        if position == self._last_position:
            self._remember(self._family.stacks[stack], result)
        return result

    def _first(self, arguments: Mapping[str, Tensor], compute: Callable[[], Result]) -> Result:
        stack = self._family.stacks[self._first_position[0]]
        stream = stack.stream_with(self._family.cached)
        before = arguments[stream.argument]
        if stack.in_place:
            before = before.clone()
        result = compute()
        after = _take(result, stream)
        self._num_tokens = after.shape[stream.token_dim]
        self._first_residual = after - before
        self.decided = True
        if self._first_position == self._last_position:
            return result
        self._decide()
        if self.reuses:
            rest = [cache.reuse() for cache in self._caches]
            self._first_out = after + (rest[0] if len(rest) == 1 else torch.cat(rest))
        elif self._run.threshold > 0:
            self._first_out = after.clone() if stack.in_place else after
        return result

    def _decide(self) -> None:
        config, threshold = self._run.config, self._run.threshold
        chunks = self._first_residual.chunk(len(self._caches))
        diffs = [cache.diff(chunk) for cache, chunk in zip(self._caches, chunks, strict=True)]
        known = [diff for diff in diffs if diff is not None]
        # One device sync per call, whatever the number of conditionings.
        values = iter(torch.stack(known).tolist() if known else ())
        self.diffs = [None if diff is None else next(values) for diff in diffs]
        self.reuses = (
            self._step.allowed
            and self._step.index >= config.warmup_steps
            and all(diff is not None and diff < threshold for diff in self.diffs)
            and all(cache.allows_hit(config.max_consecutive_hits) for cache in self._caches)
        )

    def _remember(self, stack: BlockStack, result: Result) -> None:
        rest = [None] * len(self._caches)
        if self._first_out is not None:
            stream = stack.stream_with(self._family.cached)
            last = self._cached_tokens(_take(result, stream), stream)
            rest = (last - self._first_out).chunk(len(self._caches))
        first = self._first_residual.chunk(len(self._caches))
        for cache, chunk, chunk_rest in zip(self._caches, first, rest, strict=True):
            cache.remember(chunk, chunk_rest)
        self._first_residual = self._first_out = None

    def _skip(
        self, stack: BlockStack, arguments: Mapping[str, Tensor], *, restore: bool
    ) -> dict[str, Tensor] | tuple[Tensor, ...] | Tensor:
        values = {stream: arguments[stream.argument] for stream in stack.streams}
        if restore:
            # Not from the argument: the host may have added ControlNet residuals to it between skipped blocks, and
            # the kept residual already holds them.
            stream = stack.stream_with(self._family.cached)
            values[stream] = self._restored(values[stream], stream)
            self._first_out = self._first_residual = None
        return _result(values)

    def _restored(self, tensor: Tensor, stream: Stream) -> Tensor:
        num_others = tensor.shape[stream.token_dim] - self._num_tokens
        if num_others == 0:
            return self._first_out
        if stream.holds[0] == self._family.cached:
            others = tensor.narrow(stream.token_dim, self._num_tokens, num_others)
            return torch.cat((self._first_out, others), stream.token_dim)
        return torch.cat((tensor.narrow(stream.token_dim, 0, num_others), self._first_out), stream.token_dim)

    def _cached_tokens(self, tensor: Tensor, stream: Stream) -> Tensor:
        start = 0 if stream.holds[0] == self._family.cached else tensor.shape[stream.token_dim] - self._num_tokens
        return tensor.narrow(stream.token_dim, start, self._num_tokens)


def _take(result: Mapping[str, Tensor] | tuple[Tensor, ...] | Tensor, stream: Stream) -> Tensor:
    return result if stream.result is None else result[stream.result]


def _result(values: Mapping[Stream, Tensor]) -> dict[str, Tensor] | tuple[Tensor, ...] | Tensor:
    """A block's return value from its streams, in the form that their `result` keys say."""
    keys = [stream.result for stream in values]
    if keys == [None]:
        return next(iter(values.values()))
    if isinstance(keys[0], str):
        return {stream.result: value for stream, value in values.items()}
    return tuple(value for _, value in sorted(zip(keys, values.values(), strict=True), key=lambda pair: pair[0]))
