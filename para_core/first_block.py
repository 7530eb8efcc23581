"""Drives a model call through the first-block cache: block 0 decides, the last block remembers or restores."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

import torch
from torch import Tensor

from .budget import Budget
from .decision import Decision
from .families import BlockStack, ModelFamily, Stream
from .residual_cache import ResidualCache, alone
from .row_chunks import RowChunks
from .run_state import RunState, Step
from .streams import Arguments, Result, argument_of, as_result, result_of, tokens_of, with_result, with_tokens


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
        *,
        budget: Budget | None = None,
        rows: RowChunks | None = None,
    ) -> None:
        self.decided = self._ended = False
        self._rows = rows or RowChunks(len(caches[0]))
        self._decision = Decision(run, caches, step, budget, self._rows)
        self._run, self._family, self._caches, self._step = run, family, caches, step
        positions = [(stack, index) for stack, count in enumerate(num_blocks) for index in range(count)]
        self._first_position, self._last_position = positions[0], positions[-1]
        # Of each cached stream: block 0's residual, and its output; on a hit the restored output of the last block.
        self._first_residuals: list[Tensor] = []
        self._first_outs: list[Tensor] = []

    @property
    def reuses(self) -> bool:
        return self._decision.reuses

    @property
    def measured(self) -> bool:
        """Block 0 has run."""
        return self._decision.measured

    @property
    def diffs(self) -> list[float | None]:
        """The estimate of each conditioning, None where there is none."""
        return self._decision.diffs

    def block(
        self,
        stack: int,
        index: int,
        arguments: Arguments,
        compute: Callable[[], Result],
        *,
        shapes: Hashable = None,
        patched: bool = False,
    ) -> Result:
        """What block `index` of stack number `stack` returns: computed, passed through, or restored.

        arguments: at least the stack's stream arguments. compute: runs the block (and other packs' patches) on them.
        shapes: only of a stack that reshapes: of everything that the block is called with; they decide the result's.
        patched: another pack's patch is in `compute`, which expects to be called at block 0 at every step.
        """
        position = (stack, index)
        self._ended = position == self._last_position
        if position == self._first_position and (patched or not self._foreseen(arguments)):
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

    def _foreseen(self, arguments: Arguments) -> bool:
        """Whether this call is reused without running block 0; then what the last block returns is known here."""
        if self._first_position == self._last_position:
            return False
        streams = self._streams(self._family.stacks[self._first_position[0]])
        tokens = [argument_of(arguments, stream) for stream in streams]
        if not self._decision.foresee(tokens, streams):
            return False
        self._first_outs = [
            tensor + _together([cache.reuse_unmeasured(self._step.time, self._step.width) for cache in caches], stream)
            for tensor, caches, stream in zip(tokens, self._caches, streams, strict=True)
        ]
        self.decided = True
        return True

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
        self._decision.measure(self._first_residuals, streams)
        if self.reuses:
            self._first_outs = [
                out + _together([cache.reuse(self._step.time, self._step.width) for cache in caches], stream)
                for out, caches, stream in zip(after, self._caches, streams, strict=True)
            ]
        else:
            self._first_outs = [out.clone() for out in after] if stack.in_place else after
        return result

    def _remember(self, stack: BlockStack, result: Result) -> Result:
        """Keep what this computed call showed, and return its result with what the caches would have added to it."""
        first_streams = self._streams(self._family.stacks[self._first_position[0]])
        for name, caches, residual, out, stream in zip(
            self._family.cached, self._caches, self._first_residuals, self._first_outs, first_streams, strict=True
        ):
            rest = self._residual_since(out, name, stack, result)
            chunks = [None] * len(caches) if rest is None else self._rows.of(rest, stream.batch_dim)
            firsts = self._rows.of(residual, stream.batch_dim)
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
        if position == self._first_position:
            # clone: what block 0 returns may be written to, which must not reach what the host gave it
            values = {stream: value.clone() if stack.in_place else value for stream, value in values.items()}
        elif position == self._last_position:
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
