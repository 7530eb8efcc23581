"""Who holds which tokens of a model call, and what of a block's arguments and results belongs to them."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from .attention.sharding import Layout, Split
from .families import PerToken, Sharding, Stream
from .streams import Result, argument_of, result_of, with_argument, with_stream

Arguments = dict[str | int, object]
Unit = tuple[str, ...]  # token streams that one tensor holds in the first block; they are split as one


class SequenceRanks(Protocol):
    """The ranks that a sequence is split among, in the order of its tokens; `MeshRanks` is one."""

    rank: int
    num_ranks: int

    def gather(self, tensor: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """Every rank's tokens along `dim`, in rank order."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], **options) -> Tensor:
        """Of this rank's queries to every rank's keys, as `context_attention`."""

    def max(self, values: Tensor) -> Tensor:
        """The largest of each over all ranks, of other rows of the batch too; the tensor itself is overwritten."""


class TokenSplits:
    """Decided by what the first block is given. False where nothing is split, since a stream has too few tokens."""

    def __init__(self, ranks: SequenceRanks) -> None:
        self._ranks = ranks
        self._splits: dict[Unit, Split] = {}
        self._grids: dict[Unit, torch.Size] = {}  # what the tokens were laid out in
        self._crops: dict[Unit, int] = {}
        self._local: dict[Hashable, tuple[object, object]] = {}  # an argument, and what of it is this rank's

    def __bool__(self) -> bool:
        return bool(self._splits)

    def __getitem__(self, unit: Unit) -> Split:
        return self._splits[unit]

    def decide(self, streams: Sequence[Stream], arguments: Arguments) -> Arguments:
        """Split the first block's streams among the ranks; returns its arguments with this rank's tokens in them."""
        tokens = {stream: _in_line(argument_of(arguments, stream), stream) for stream in streams}
        num_ranks, first = self._ranks.num_ranks, 0
        totals = {stream: tensor.shape[stream.token_dim] for stream, tensor in tokens.items()}
        if any(0 < total < num_ranks for total in totals.values()):
            return arguments
        for stream, total in totals.items():
            # Where the one stream's surplus ends the next one's begins: then no rank has two tokens more than another.
            split = self._splits[stream.holds] = Split.even(total, num_ranks, self._ranks.rank, first)
            first = (first + total) % num_ranks
            end = stream.token_dim + stream.grid
            self._grids[stream.holds] = argument_of(arguments, stream).shape[stream.token_dim : end]
            # clone: blocks write into what they are given, and the host may still need it.
            part = Layout((split,)).take(tokens[stream], stream.token_dim).clone()
            arguments = with_argument(arguments, stream, _in_grid(part, stream, (split.length,)))
        return arguments

    def layout(self, names: tuple[str, ...], *, in_attention: bool = False) -> Layout:
        """Of the streams called so, in this order; in_attention: without the padding that takes no part in it."""
        crops = self._crops if in_attention else {}
        units = self._units(names)
        return Layout(tuple(split.cropped(crops[unit]) if unit in crops else split for unit, split in units))

    def _units(self, names: tuple[str, ...]) -> Iterator[tuple[Unit, Split]]:
        while names:
            unit = next(unit for unit in self._splits if names[: len(unit)] == unit)
            yield unit, self._splits[unit]
            names = names[len(unit) :]

    def local(self, sharding: Sharding, arguments: Arguments) -> Arguments:
        """The arguments with everything per token cut to this rank's."""
        local = dict(arguments)
        for per_token in sharding.per_token:
            source = local.get(per_token.argument)
            if source is None:
                continue
            key = (id(sharding), per_token)
            # Hosts give the same object to every block.
            if key not in self._local or self._local[key][0] is not source:
                self._local[key] = (source, self._cut(per_token, source))
            local[per_token.argument] = self._local[key][1]
        return local

    def _cut(self, per_token: PerToken, source: object) -> object:
        layout = self.layout(per_token.holds)
        if per_token.kind == "unsupported":
            raise ValueError(
                f"`{per_token.argument}` cannot be split among ranks. Leave out what sets it, or remove the "
                "Context-Parallel Launcher."
            )
        if per_token.kind == "crop":
            self._crops[per_token.holds] = source
        if per_token.kind in ("boundary", "crop"):
            return layout.splits[0].local(source)
        if per_token.kind == "spans":
            return layout.spans(source, [unit[0] in per_token.counted for unit, _ in self._units(per_token.holds)])
        if per_token.part is None:
            tensor = source if isinstance(source, Tensor) else getattr(source, per_token.attribute)
            return _cut_tensor(per_token, layout, tensor)
        found = source[per_token.part]
        if not isinstance(found, Tensor):
            return source
        return (*source[: per_token.part], _cut_tensor(per_token, layout, found), *source[per_token.part + 1 :])

    def gathered(self, streams: Sequence[Stream], result: Result, names: Iterable[str]) -> Result:
        """The result with every rank's tokens of the streams called `names`; of others this rank's."""
        for unit in [unit for unit in self._splits if set(unit) & set(names)]:
            stream = next(stream for stream in streams if unit[0] in stream.holds)
            value, dim, split = result_of(result, stream), stream.token_dim, self._splits[unit]
            if stream.grid > 1:
                value = value.flatten(dim, dim + stream.grid - 1)
            start = self.layout(stream.holds[: stream.holds.index(unit[0])]).length
            whole = self._ranks.gather(value.narrow(dim, start, split.length), dim, split.lengths)
            if stream.holds != unit:
                behind = start + split.length
                parts = (value.narrow(dim, 0, start), whole, value.narrow(dim, behind, value.shape[dim] - behind))
                whole = torch.cat(parts, dim)
            result = with_stream(result, stream, _in_grid(whole, stream, self._grids[unit]))
        return result


def _in_line(tensor: Tensor, stream: Stream) -> Tensor:
    """The tensor with the stream's tokens along one dim."""
    return tensor.flatten(stream.token_dim, stream.token_dim + stream.grid - 1) if stream.grid > 1 else tensor


def _in_grid(tensor: Tensor, stream: Stream, sizes: Sequence[int]) -> Tensor:
    """Back from `_in_line`; this rank's part of a grid is a column."""
    if stream.grid == 1:
        return tensor
    return tensor.unflatten(stream.token_dim, (*sizes, *(1,) * (stream.grid - len(sizes))))


def _cut_tensor(per_token: PerToken, layout: Layout, tensor: Tensor) -> Tensor:
    if tensor.ndim < per_token.ndim:
        return tensor
    if per_token.grid > 1:
        (dim,) = per_token.dims
        column = layout.take(tensor.flatten(dim, dim + per_token.grid - 1), dim)
        return column.unflatten(dim, (layout.length, *(1,) * (per_token.grid - 1)))
    sizes = [tensor.shape[dim] for dim in per_token.dims]
    if layout.total in sizes:
        return layout.take(tensor, per_token.dims[sizes.index(layout.total)])
    if sizes[0] == 1 or (per_token.counted and sizes[0] == layout.length):
        return tensor
    if per_token.repeats:
        return layout.take_repeated(tensor, per_token.dims[0])
    raise ValueError(
        f"`{per_token.argument}` is about {sizes[0]} tokens where the block has {layout.total}; "
        "this use of the model cannot be split among ranks. Run it without the Context-Parallel Launcher."
    )
