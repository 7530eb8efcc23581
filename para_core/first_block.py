"""Drives a model call through the first-block cache: block 0 decides, the last block remembers or restores."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from .budget import Budget
from .families import BlockStack, ModelFamily, Stream
from .residual_cache import CacheConfig, Reduce, ResidualCache, alone
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


class RunState:
    """What the calls of one run share.

    shapes: what blocks that reshape returned, by what they were given. branch_reaches_end: a branch was added behind
    the last block, where nothing remembers it. reduce: adds up a small tensor over the ranks of a group, each of which
    makes the same calls with some of the tokens; all decide alike, and call it equally often.
    """

    def __init__(self, config: CacheConfig, threshold: float, reduce: Reduce = alone) -> None:
        self.config = config
        self.threshold = threshold
        self.reduce = reduce
        self.shapes: dict[Hashable, torch.Size] = {}
        self.branch_reaches_end = False


class CachedCall:
    """One forward of one model. `block` stands in for every block of the family's stacks, in execution order.

    caches: of each cached stream, one for each conditioning in the batch.
    """

    def __init__(
        self,
        run: RunState,
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
        else:
            self._first_outs = [out.clone() for out in after] if stack.in_place else after
        return result

    def _decide(self, streams: list[Stream]) -> None:
        measured = [
            [
                (cache, cache.figures(chunk))
                for cache, chunk in zip(caches, residual.chunk(len(caches), stream.batch_dim), strict=True)
            ]
            for caches, residual, stream in zip(self._caches, self._first_residuals, streams, strict=True)
        ]
        known = torch.cat([figures for of_stream in measured for _, figures in of_stream])
        # One device sync per call, whatever the number of conditionings.
        values = iter(self._run.reduce(known).tolist() if len(known) else ())
        estimates = [
            [cache.estimate(list(islice(values, len(figures))), self._step.time) for cache, figures in of_stream]
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
        for name, caches, residual, out, stream in zip(
            self._family.cached, self._caches, self._first_residuals, self._first_outs, first_streams, strict=True
        ):
            rest = self._residual_since(out, name, stack, result)
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
        if last.shape == first_out.shape:
            return last - first_out
        # Other packs' patches may change the number of tokens on the way; then nothing is reused.
        if self._run.reduce is alone:
            return None
        raise ValueError(
            f"a patch on the blocks turned {tuple(first_out.shape)} tokens into {tuple(last.shape)}; with the tokens "
            "split among ranks their number has to stay. Remove that patch, the cache or the context parallelism."
        )

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
