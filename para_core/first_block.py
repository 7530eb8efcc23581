"""Drives model calls through the first-block cache: block 0 decides, the last block remembers or restores."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .budget import Budget
from .cache_report import RunReport, StepRecord
from .families import BlockStack, ModelFamily, Stream
from .predicted_cache import PredictedCache
from .residual_cache import CacheConfig, ResidualCache
from .streams import Arguments, Result, argument_of, as_result, result_of, tokens_of, with_result, with_tokens


@dataclass(frozen=True)
class Step:
    """Where in the schedule a model call is.

    index: of the sampler step, from 0; num_steps of them in the run, 0: not known. allowed: reuse may happen here.
    at: the time that the model is conditioned on, by default sigma. width: of the step, in sigma; 0: not known.
    """

    index: int
    sigma: float
    allowed: bool = True
    at: float | None = None
    width: float = 0.0
    num_steps: int = 0

    @property
    def time(self) -> float:
        return self.sigma if self.at is None else self.at


class CacheRun:
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

    def __init__(self, family: ModelFamily, config: CacheConfig) -> None:
        threshold = config.residual_diff_threshold
        self.family = family
        self.config = config
        default = family.residual_diff_threshold * self.DEFAULT_SHARE[config.decision]
        self.threshold = default if threshold is None else threshold
        self._budgets: dict[tuple[Hashable, ...], Budget] = {}  # of conditionings that are evaluated together
        self._caches: dict[Hashable, tuple[ResidualCache, ...]] = {}  # of a conditioning: one per cached stream
        self._last_step: dict[Hashable, int] = {}
        self._labels: dict[Hashable, str] = {}
        self._records: dict[str, list[StepRecord]] = {}
        self._num_calls = {False: 0, True: 0}
        self._call_seconds = {False: 0.0, True: 0.0}
        self._num_block_calls = 0
        self._num_block_calls_baseline = 0
        self._started: float | None = None  # the first model call; loading the model is not the cache's time
        self.shapes: dict[Hashable, torch.Size] = {}  # what blocks that reshape returned, by what they were given
        self.branch_reaches_end = False  # whether a branch was added behind the last block, where nothing remembers it

    @contextmanager
    def call(
        self, family: ModelFamily, num_blocks: Sequence[int], conditionings: Mapping[Hashable, str], step: Step
    ) -> Iterator[CachedCall]:
        """One model call over a batch whose equal row chunks are `conditionings` (key to name), in order.

        num_blocks: blocks of each of the family's stacks.
        """
        caches = [self._cache(key, step.index, len(family.cached)) for key in conditionings]
        budget = self._budget(tuple(conditionings), sum(num_blocks))
        call = CachedCall(self, family, num_blocks, list(zip(*caches, strict=True)), step, budget)
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

    def _cache(self, key: Hashable, step: int, num_streams: int) -> tuple[ResidualCache, ...]:
        if key not in self._caches:
            for stale in [k for k, last in self._last_step.items() if abs(step - last) > self.STALE_STEPS]:
                del self._caches[stale], self._last_step[stale]
        self._last_step[key] = step
        make = self.CACHES[self.config.decision]
        return self._caches.setdefault(key, tuple(make(self.config) for _ in range(num_streams)))

    def _budget(self, keys: tuple[Hashable, ...], num_blocks: int) -> Budget | None:
        if not self.config.target_speedup:
            return None
        if keys not in self._budgets:
            self._budgets[keys] = Budget(self.config.target_speedup, num_blocks)
        return self._budgets[keys]

    def report(self, *, num_steps: int = 0, finished: bool = True) -> RunReport:
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
            num_bytes=sum(cache.num_bytes for caches in self._caches.values() for cache in caches),
            num_steps=num_steps,
            finished=finished,
        )


class CachedCall:
    """One forward of one model. `block` stands in for every block of the family's stacks, in execution order.

    caches: of each cached stream, one for each conditioning in the batch.
    """

    def __init__(
        self,
        run: CacheRun,
        family: ModelFamily,
        num_blocks: Sequence[int],
        caches: Sequence[tuple[ResidualCache, ...]],
        step: Step,
        budget: Budget | None = None,
    ) -> None:
        self.decided = False
        self.reuses = False
        self._ended = False
        self.diffs: list[float | None] = [None] * len(caches[0])
        self._run, self._family, self._caches, self._step, self._budget = run, family, caches, step, budget
        positions = [(stack, index) for stack, count in enumerate(num_blocks) for index in range(count)]
        self._first_position, self._last_position = positions[0], positions[-1]
        # Of each cached stream: block 0's residual, and its output; on a hit the restored output of the last block.
        self._first_residuals: list[Tensor] = []
        self._first_outs: list[Tensor] = []

    def block(
        self,
        stack: int,
        index: int,
        arguments: Arguments,
        compute: Callable[[], Result],
        *,
        shapes: Hashable = None,
    ) -> Result:
        """What block `index` of stack number `stack` returns: computed, passed through, or restored.

        arguments: at least the stack's stream arguments. compute: runs the block (and other packs' patches) on them.
        shapes: only of a stack that reshapes: of everything that the block is called with; they decide the result's.
        """
        position = (stack, index)
        self._ended = position == self._last_position
        if position == self._first_position:
            return self._first(arguments, compute)
        if self.reuses:
            return self._skip(position, arguments, compute, shapes)
        result = compute()
        if shapes is not None:
            self._run.shapes[(position, shapes)] = result.shape
        if position == self._last_position and self.decided:
            return self._remember(self._family.stacks[stack], result)
        return result

    def branch(self, values: Mapping[Stream, Tensor], compute: Callable[[], Result]) -> Result:
        """What a block of a side branch returns; on a reused step its own `values`, if only skipped blocks see them."""
        self._run.branch_reaches_end |= self._ended
        if self.reuses and not self._run.branch_reaches_end:
            return as_result(values)
        return compute()

    def _streams(self, stack: BlockStack) -> list[Stream]:
        return [stack.stream_with(name) for name in self._family.cached]

    def _first(self, arguments: Arguments, compute: Callable[[], Result]) -> Result:
        stack = self._family.stacks[self._first_position[0]]
        streams = self._streams(stack)
        before = [argument_of(arguments, stream) for stream in streams]
        if stack.in_place:
            before = [tensor.clone() for tensor in before]
        result = compute()
        after = [result_of(result, stream) for stream in streams]
        self._first_residuals = [out - tensor for out, tensor in zip(after, before, strict=True)]
        self.decided = True
        if self._first_position == self._last_position:
            return result
        self._decide(streams)
        if self.reuses:
            self._first_outs = [
                out + _together([cache.reuse(self._step.time, self._step.width) for cache in caches], stream)
                for out, caches, stream in zip(after, self._caches, streams, strict=True)
            ]
        elif self._run.threshold > 0 or self._budget is not None:
            self._first_outs = [out.clone() for out in after] if stack.in_place else after
        return result

    def _decide(self, streams: list[Stream]) -> None:
        measured = [
            [
                (cache, cache.measure(chunk))
                for cache, chunk in zip(caches, residual.chunk(len(caches), stream.batch_dim), strict=True)
            ]
            for caches, residual, stream in zip(self._caches, self._first_residuals, streams, strict=True)
            if residual.numel()  # a stream without tokens (LTX-AV without sound) has no say
        ]
        known = [figures for of_stream in measured for _, figures in of_stream if figures is not None]
        # One device sync per call, whatever the number of conditionings.
        values = iter(torch.cat(known).tolist() if known else ())
        estimates = [
            [
                None if figures is None else cache.judge(list(islice(values, len(figures))), self._step.time)
                for cache, figures in of_stream
            ]
            for of_stream in measured
        ]
        self.diffs = [None if None in of_one else max(of_one) for of_one in zip(*estimates, strict=True)]
        config = self._run.config
        possible = (
            self._step.allowed
            and self._step.index >= config.warmup_steps
            and None not in self.diffs
            and all(cache.allows_hit(config.max_consecutive_hits) for caches in self._caches for cache in caches)
        )
        self.reuses = possible and all(diff < self._run.threshold for diff in self.diffs)
        if self._budget is not None:
            estimate = max(self.diffs) if possible else None
            self.reuses = self._budget.allows_reuse(estimate, self._step.index, self._step.num_steps)
            self._budget.note(reused=self.reuses)

    def _remember(self, stack: BlockStack, result: Result) -> Result:
        """Keep what this computed call showed, and return its result with what the caches would have added to it."""
        first_streams = self._streams(self._family.stacks[self._first_position[0]])
        outs = self._first_outs or [None] * len(first_streams)
        for name, caches, residual, out, stream in zip(
            self._family.cached, self._caches, self._first_residuals, outs, first_streams, strict=True
        ):
            rest = None if out is None else self._residual_since(out, name, stack, result)
            chunks = [None] * len(caches) if rest is None else rest.chunk(len(caches), stream.batch_dim)
            firsts = residual.chunk(len(caches), stream.batch_dim)
            corrections = [
                cache.remember(first, chunk, self._step.time, self._step.width)
                for cache, first, chunk in zip(caches, firsts, chunks, strict=True)
            ]
            if any(correction is not None for correction in corrections):
                corrections = [
                    torch.zeros_like(chunk) if correction is None else correction
                    for correction, chunk in zip(corrections, chunks, strict=True)
                ]
                corrected = out + rest + _together(corrections, stream)
                result = with_result(result, stack.stream_with(name), name, corrected)
        self._first_residuals, self._first_outs = [], []
        return result

    def _residual_since(self, first_out: Tensor, name: str, stack: BlockStack, result: Result) -> Tensor | None:
        """What all blocks behind block 0 did to the stream `name`."""
        stream = stack.stream_with(name)
        last = tokens_of(result_of(result, stream), stream, name, first_out.shape[stream.token_dim])
        # Other packs' patches may change the number of tokens on the way; then nothing is reused.
        return last - first_out if last.shape == first_out.shape else None

    def _skip(
        self,
        position: tuple[int, int],
        arguments: Arguments,
        compute: Callable[[], Result],
        shapes: Hashable,
    ) -> Result:
        stack = self._family.stacks[position[0]]
        values = {stream: argument_of(arguments, stream) for stream in stack.streams}
        if position == self._last_position:
            # Not from the arguments: the host may have added ControlNet residuals to them between skipped blocks, and
            # the kept residual already holds those.
            for name, first_out in zip(self._family.cached, self._first_outs, strict=True):
                stream = stack.stream_with(name)
                values[stream] = with_tokens(values[stream], stream, name, first_out)
            self._first_outs, self._first_residuals = [], []
        elif shapes is not None:
            shape = self._run.shapes.get((position, shapes))
            if shape is None:  # another pack's patch has changed the shapes since: only the block itself knows
                return compute()
            (stream,) = values
            if shape != values[stream].shape:
                values[stream] = values[stream].new_zeros(shape)
        return as_result(values)


def _together(tensors: list[Tensor], stream: Stream) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, stream.batch_dim)
