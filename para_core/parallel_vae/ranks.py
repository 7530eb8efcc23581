"""How many latent rows each rank has, and how rows travel between ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

MIN_UNITS = 2  # below it a view can be read in two ways, see Rows.viewed


def split(length: int, num_ranks: int) -> tuple[int, ...]:
    """Return the latent rows of each rank; they differ by one at most."""
    return tuple(length // num_ranks + (rank < length % num_ranks) for rank in range(num_ranks))


class Ranks:
    """The ranks of a process group, each with a slice of the latent rows."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, length: int) -> None:
        """group None is the default group. device: where tensors travel. length: of the latent's split dim."""
        self._group = group or dist.group.WORLD
        self._device = device
        self.rank, self.units = dist.get_rank(group), split(length, dist.get_world_size(group))

    @property
    def own_units(self) -> int:
        """The latent rows of this rank."""
        return self.units[self.rank]

    @property
    def start(self) -> int:
        """The first latent row of this rank."""
        return sum(self.units[: self.rank])

    def beyond_image(self, inner: int, reach: tuple[int, int]) -> list[int]:
        """Return how many of the rows before and after this rank's own lie outside of the image."""
        behind = sum(self.units) - self.start - self.own_units
        return [max(0, reach[0] - self.start * inner), max(0, reach[1] - behind * inner)]

    def extend(self, x: Tensor, dim: int, inner: int, reach: tuple[int, int]) -> Tensor:
        """Return x with reach rows of other ranks before and after its own, fewer where the image ends.

        inner: rows of x for each unit. Called by every rank with the same reach; rows come from ranks further away
        where the neighbour has too few.
        """
        return self._collect(x, dim, [units * inner for units in self.units], lambda rank: reach)

    def gather(self, x: Tensor, dim: int, inner: int, destination: int | None = None) -> Tensor:
        """Return the rows of all ranks in order; where a destination is given, the others get only their own."""
        total = sum(self.units) * inner
        sizes = [units * inner for units in self.units]
        return self._collect(x, dim, sizes, lambda rank: (total, total) if destination in (None, rank) else (0, 0))

    def gather_one_each(self, x: Tensor) -> Tensor:
        """Return the ranks' tensors, all of one shape, stacked in order along a new dim 0."""
        total = len(self.units)
        return self._collect(x[None], 0, [1] * total, lambda rank: (total, total))

    def _collect(self, x: Tensor, dim: int, sizes: Sequence[int], reach: Callable[[int], tuple[int, int]]) -> Tensor:
        ends = [sum(sizes[: rank + 1]) for rank in range(len(sizes))]
        own = [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        wanted = [(start - reach(rank)[0], end + reach(rank)[1]) for rank, (start, end) in enumerate(own)]
        sends, pieces = {}, {self.rank: x}
        for rank in range(len(sizes)):
            if rank == self.rank:
                continue
            start, length = _overlap(own[self.rank], wanted[rank])
            if length:
                sends[rank] = x.narrow(dim, start - own[self.rank][0], length).to(self._device).contiguous()
            _, length = _overlap(own[rank], wanted[self.rank])
            if length:
                shape = (*x.shape[:dim], length, *x.shape[dim + 1 :])
                pieces[rank] = torch.empty(shape, dtype=x.dtype, device=self._device)
        received = {rank: piece for rank, piece in pieces.items() if rank != self.rank}
        self._travel(sends, received)
        if not received:
            return x
        return torch.cat([pieces[rank].to(x.device) for rank in sorted(pieces)], dim)

    def _travel(self, sends: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        """Send, and fill what is to be received; keys are ranks of the group."""
        peers = sorted(sends.keys() | received.keys())
        operations = []
        for rank in peers:
            peer = dist.get_global_rank(self._group, rank)
            if rank in sends:
                operations.append(dist.P2POp(dist.isend, sends[rank], peer, self._group))
            if rank in received:
                operations.append(dist.P2POp(dist.irecv, received[rank], peer, self._group))
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()


class RehearsedRanks(Ranks):
    """Ranks that exist on paper only: shapes are right, nothing is sent."""

    def __init__(self, num_ranks: int, device: torch.device, length: int) -> None:
        """The rehearsing rank is the second, so that it has neighbours on both sides where there are three."""
        self._device = device
        self.rank, self.units = 1, split(length, num_ranks)

    def _travel(self, sends: dict[int, Tensor], received: dict[int, Tensor]) -> None:
        pass


def _overlap(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Return start and length of what two ranges share."""
    start, end = max(one[0], other[0]), min(one[1], other[1])
    return start, max(0, end - start)
