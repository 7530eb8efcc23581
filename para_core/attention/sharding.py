"""A sequence of tokens on several ranks: which of them each one holds, and what else belongs to those."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Span = tuple  # (start, end or None, and what holds there)


@dataclass(frozen=True)
class Split:
    """Consecutive tokens, in rank order. lengths: how many of them each rank holds; rank: this one."""

    lengths: tuple[int, ...]
    rank: int

    @classmethod
    def even(cls, total: int, num_ranks: int, rank: int, first: int = 0) -> Split:
        """As even as possible; the ranks from number `first` on hold one token more, as far as there are any left."""
        share, rest = divmod(total, num_ranks)
        return cls(tuple(share + ((number - first) % num_ranks < rest) for number in range(num_ranks)), rank)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def length(self) -> int:
        return self.lengths[self.rank]

    @property
    def start(self) -> int:
        return sum(self.lengths[: self.rank])

    def local(self, position: int) -> int:
        """Where a boundary in front of token `position` is among this rank's tokens; at an end, if it is elsewhere."""
        return min(max(position - self.start, 0), self.length)

    def cropped(self, count: int) -> Split:
        """The first `count` of the tokens, where they are."""
        ends = itertools.accumulate(self.lengths)
        lengths = (length - min(max(end - count, 0), length) for length, end in zip(self.lengths, ends, strict=True))
        return Split(tuple(lengths), self.rank)


@dataclass(frozen=True)
class Layout:
    """Several splits behind each other, as a tensor of a joint attention holds them."""

    splits: tuple[Split, ...]

    @property
    def total(self) -> int:
        return sum(split.total for split in self.splits)

    @property
    def length(self) -> int:
        return sum(split.length for split in self.splits)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of every rank, in rank order."""
        return tuple(map(sum, zip(*(split.lengths for split in self.splits), strict=True)))

    def take(self, tensor: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor with all tokens along `dim`."""
        parts, start = [], 0
        for split in self.splits:
            parts.append(tensor.narrow(dim, start + split.start, split.length))
            start += split.total
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def take_repeated(self, tensor: Tensor, dim: int) -> Tensor:
        """The same of a tensor whose rows stand for equally many neighbouring tokens each."""
        repeats = -(-self.total // tensor.shape[dim])
        rows = torch.arange(self.total, device=tensor.device) // repeats
        return tensor.index_select(dim, self.take(rows, 0))

    def rank_major(self, device: torch.device) -> Tensor:
        """The number of each token, sorted by the rank that holds it: the order of keys gathered from all ranks."""
        numbers, start = [], 0
        for split in self.splits:
            numbers.append(torch.arange(start, start + split.total, device=device).split(split.lengths))
            start += split.total
        return torch.cat([part for of_rank in zip(*numbers, strict=True) for part in of_rank])

    def spans(self, spans: Sequence[Span], counted: Sequence[bool]) -> list[Span]:
        """Spans over all tokens, cut to this rank's; of the splits that are `counted` they know this rank's only."""
        found = []
        for start, end, *what in spans:
            source = target = 0
            for split, known in zip(self.splits, counted, strict=True):
                size = split.length if known else split.total
                low = max(start - source, 0)
                high = size if end is None else min(end - source, size)
                if not known:
                    low, high = split.local(low), split.local(high)
                if low < high:
                    found.append((target + low, target + high, *what))
                source, target = source + size, target + split.length
        return found
