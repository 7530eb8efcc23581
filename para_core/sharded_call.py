"""Drives a model call on one of several ranks: the blocks get this rank's tokens, and the last one's are gathered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from .attention.sharding import Layout, Split
from .families import ModelFamily, PerToken, Sharding, Stream
from .streams import Result, argument_of, result_of, with_argument, with_stream

Arguments = dict[str | int, object]
Residuals = Mapping[str, list[Tensor | None]]


class SequenceRanks(Protocol):
    """The ranks that a sequence is split among, in the order of its tokens; `MeshRanks` is one."""

    rank: int
    num_ranks: int

    def gather(self, tensor: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """Every rank's tokens along `dim`, in rank order."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], **options) -> Tensor:
        """Of this rank's queries to every rank's keys, as `context_attention`."""


def sharding_obstacle(model: nn.Module, family: ModelFamily) -> str | None:
    """Why the tokens of this model cannot be split among ranks; None if they can."""
    known = _is_named(type(model), (*family.classes, *family.sharded))
    for cls in (type(model),) if known else type(model).__mro__:
        for name, reason in family.unsharded.items():
            if _is_named(cls, (name,)):
                return reason
    if not known:  # a subclass may do anything between its blocks
        return "what it does between its blocks is not known"
    for stack in (*family.stacks, *family.branches):
        if stack.sharding is None and stack.blocks_in(model):
            return f"it is not known how the tokens in `{stack.blocks}` are to be split"
    return None


def _is_named(cls: type, names: Iterable[str]) -> bool:
    return any(f".{cls.__module__}.{cls.__qualname__}".endswith(f".{name}") for name in names)


class ShardedCall:
    """One forward of one model. `block` stands in for every block of the family's stacks, in execution order.

    num_blocks: blocks of each of the family's stacks. residuals: what the host will add to the image tokens behind
    the blocks, in lists of this call's own; cut to this rank's tokens when they are known. finished: the last block
    has run.
    """

    def __init__(
        self, family: ModelFamily, num_blocks: Sequence[int], ranks: SequenceRanks, residuals: Residuals | None = None
    ) -> None:
        positions = [(stack, index) for stack, count in enumerate(num_blocks) for index in range(count)]
        self._family, self._ranks, self._residuals = family, ranks, residuals or {}
        self._first, self._last = positions[0], positions[-1]
        self._splits: dict[tuple[str, ...], Split] = {}  # of what the first block is given; empty: nothing is split
        self._localized: dict[Hashable, tuple[object, object]] = {}  # source and what of it is this rank's
        self._masks: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._crops: dict[tuple[str, ...], int] = {}
        self._attentions: Iterator[tuple[str, ...]] = iter(())
        self._num_blocks, self._stack = num_blocks, self._first[0]
        self.finished = False

    def block(self, stack: int, index: int, arguments: Arguments, compute: Callable[[Arguments], Result]) -> Result:
        """What block `index` of stack number `stack` returns, for this rank's tokens; for all behind the last block.

        arguments: everything that its `forward` is called with. compute: runs the block on what belongs to this rank.
        """
        sharding, streams = self._family.stacks[stack].sharding, self._family.stacks[stack].streams
        if (stack, index) == self._first:
            self._split(streams, arguments)
            arguments = self._narrowed(streams, arguments)
        if not self._splits:
            self.finished = True
            return compute(arguments)
        self._stack, self._attentions = stack, iter(sharding.attentions)
        try:
            result = compute(self._local(stack, sharding, arguments))
        finally:
            self._attentions = iter(())
        self.finished = (stack, index) == self._last
        return self._gathered(streams, result) if self.finished else result

    def next_attention(self) -> tuple[str, ...] | None:
        """The streams that the attention which is called now runs over; None if it is this rank's own affair."""
        return next(self._attentions, None) or None

    def attention(
        self, over: tuple[str, ...], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options
    ) -> Tensor:
        """The attention over all ranks' tokens of some streams. q, k, v: (B, H, S of this rank, D)."""
        layout = Layout(tuple(split.cropped(self._crops.get(unit, split.total)) for unit, split in self._units(over)))
        if mask is not None:
            mask = self._mask(over, layout, mask)
        return self._ranks.attention(q, k, v, layout.lengths, mask=mask, **options)

    def _split(self, streams: Sequence[Stream], arguments: Arguments) -> None:
        """Decide who holds what. A stream with fewer tokens than ranks leaves everything to every rank."""
        totals = {stream.holds: argument_of(arguments, stream).shape[stream.token_dim] for stream in streams}
        ranks, first = self._ranks, 0
        if min(totals.values()) < ranks.num_ranks:
            return
        for names, total in totals.items():
            # Where the one stream's surplus ends the next one's begins: then no rank has two tokens more than another.
            self._splits[names] = Split.even(total, ranks.num_ranks, ranks.rank, first)
            first = (first + total) % ranks.num_ranks
        for number, (stack, count) in enumerate(zip(self._family.stacks, self._num_blocks, strict=True)):
            if stack.sharding.residuals in self._residuals:
                # The last block's is added to the gathered tokens.
                last = count - 1 if number == self._last[0] else count
                self._cut_residuals(self._residuals[stack.sharding.residuals], last)

    def _cut_residuals(self, residuals: list[Tensor | None], count: int) -> None:
        """Those behind the first `count` blocks; they may be about the first image tokens only."""
        split = self._splits[("img",)]
        for index, residual in enumerate(residuals[:count]):
            if residual is not None:
                low, high = (min(end, residual.shape[1]) for end in (split.start, split.start + split.length))
                residuals[index] = residual[:, low:high]

    def _units(self, names: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Split]]:
        """What was split as one, and how, in the order of the streams."""
        while names:
            unit = next(unit for unit in self._splits if names[: len(unit)] == unit)
            yield unit, self._splits[unit]
            names = names[len(unit) :]

    def _layout(self, names: tuple[str, ...]) -> Layout:
        return Layout(tuple(split for _, split in self._units(names)))

    def _narrowed(self, streams: Sequence[Stream], arguments: Arguments) -> Arguments:
        for stream in streams if self._splits else ():
            # clone: blocks write into what they are given, and the host may still need it.
            tokens = self._layout(stream.holds).take(argument_of(arguments, stream), stream.token_dim).clone()
            arguments = with_argument(arguments, stream, tokens)
        return arguments

    def _local(self, stack: int, sharding: Sharding, arguments: Arguments) -> Arguments:
        """The arguments with everything per token cut to this rank's; hosts hand the same objects to every block."""
        local = dict(arguments)
        for per_token in sharding.per_token:
            source = local.get(per_token.argument)
            if source is None or (per_token.part is not None and not isinstance(source[per_token.part], Tensor)):
                continue
            key = (stack, per_token.argument, per_token.part)
            if key not in self._localized or self._localized[key][0] is not source:
                self._localized[key] = (source, self._cut(per_token, source))
            local[per_token.argument] = self._localized[key][1]
        return local

    def _cut(self, per_token: PerToken, source: object) -> object:
        layout = self._layout(per_token.holds)
        if per_token.kind == "unsupported":
            raise ValueError(
                f"`{per_token.argument}` cannot be split among ranks. Leave out what sets it, or remove the "
                "Context-Parallel Launcher."
            )
        if per_token.kind in ("boundary", "crop"):
            if per_token.kind == "crop":
                self._crops[per_token.holds] = source
            return layout.splits[0].local(source)
        if per_token.kind == "spans":
            counted = [name in per_token.counted for name in per_token.holds]
            return layout.spans(source, counted)
        if per_token.part is None:
            return self._cut_tensor(per_token, layout, source)
        cut = self._cut_tensor(per_token, layout, source[per_token.part])
        return (*source[: per_token.part], cut, *source[per_token.part + 1 :])

    @staticmethod
    def _cut_tensor(per_token: PerToken, layout: Layout, tensor: Tensor) -> Tensor:
        if tensor.ndim < per_token.ndim:
            return tensor
        sizes = [tensor.shape[dim] for dim in per_token.dims]
        if layout.total in sizes:
            return layout.take(tensor, per_token.dims[sizes.index(layout.total)])
        if sizes[0] == 1:
            return tensor
        if per_token.repeats:
            return layout.take_repeated(tensor, per_token.dims[0])
        raise ValueError(
            f"`{per_token.argument}` is about {sizes[0]} tokens where the block has {layout.total}; "
            "this use of the model cannot be split among ranks. Run it without the Context-Parallel Launcher."
        )

    def _mask(self, over: tuple[str, ...], layout: Layout, mask: Tensor) -> Tensor:
        """The mask with the keys in the order in which the ranks hold them, and its rows too where it has several."""
        if self._family.stacks[self._stack].sharding.mask_is_local:
            key = (self._stack, over)
            if key not in self._masks:
                self._masks[key] = (mask, self._ranks.gather(mask, -1, layout.lengths))
            return self._masks[key][1]
        if over not in self._masks or self._masks[over][0] is not mask:
            order = layout.rank_major(mask.device)
            sorted_mask = mask.index_select(-1, order)
            if mask.shape[-2] > 1:
                sorted_mask = sorted_mask.index_select(-2, order)
            self._masks[over] = (mask, sorted_mask)
        return self._masks[over][1]

    def _gathered(self, streams: Sequence[Stream], result: Result) -> Result:
        """The result with every rank's tokens of the streams that leave the model; of others this rank's."""
        for unit, split in self._splits.items():
            if not set(unit) & set(self._family.cached):
                continue
            stream = next(stream for stream in streams if unit[0] in stream.holds)
            value, dim = result_of(result, stream), stream.token_dim
            start = self._layout(stream.holds[: stream.holds.index(unit[0])]).length
            whole = self._ranks.gather(value.narrow(dim, start, split.length), dim, split.lengths)
            before = value.narrow(dim, 0, start)
            behind = value.narrow(dim, start + split.length, value.shape[dim] - start - split.length)
            result = with_stream(result, stream, torch.cat((before, whole, behind), dim))
        return result
