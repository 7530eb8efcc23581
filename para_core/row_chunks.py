"""The rows of a batch by the conditionings that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class RowChunks:
    """Equal chunks of a batch, one for each of so many conditionings, in order.

    here: those whose rows this rank has, all or a part of them; None: all. The others' chunks are empty.
    """

    num_conditionings: int
    here: slice | None = None

    def of(self, tensor: Tensor, dim: int) -> list[Tensor]:
        """One view for each conditioning."""
        here = range(self.num_conditionings)[self.here or slice(None)]
        chunks = iter(tensor.chunk(len(here), dim))
        return [
            next(chunks) if number in here else tensor.narrow(dim, 0, 0) for number in range(self.num_conditionings)
        ]
