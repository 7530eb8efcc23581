"""Where a tensor keeps the rows that are split over the ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Rows:
    """The split rows of a tensor lie in one dim of it, possibly merged with others or multiplied by upsampling.

    A rank owns a whole number of latent rows, its units; every tensor keeps them in order. dim has the local size
    outer * units * inner + before + after: inner rows for each unit, outer dims merged in front of them. before and
    after are rows beyond the rank's own, the neighbours' or, at the ends, padding; with them outer is 1.
    """

    dim: int
    outer: int = 1
    inner: int = 1
    before: int = 0
    after: int = 0

    @property
    def extended(self) -> bool:
        """Whether rows beyond the rank's own are there."""
        return bool(self.before or self.after)

    def size(self, units: int) -> int:
        """Return the local size of dim."""
        return self.outer * units * self.inner + self.before + self.after

    def moved(self, dim: int) -> Rows:
        """Return the same rows in another dim."""
        return replace(self, dim=dim)

    def scaled(self, factor: int) -> Rows:
        """Return the rows after each became factor rows."""
        return replace(self, inner=self.inner * factor)

    def core(self) -> Rows:
        """Return the rank's own rows alone."""
        return replace(self, before=0, after=0)

    def from_right(self, ndim: int) -> tuple[int, int, int, int, int]:
        """Return what must agree between the operands of a broadcast."""
        return ndim - self.dim, self.outer, self.inner, self.before, self.after

    def viewed(self, units: int, old: Sequence[int], new: Sequence[int]) -> Rows | None:
        """Return the rows after a view from shape old to shape new, or None where it tears them apart.

        The number of elements in front of and behind the units stays; with two units or more only one dim fits.
        """
        block, inner = (old[self.dim], 1) if self.extended else (units, self.inner)
        front, back = math.prod(old[: self.dim]) * self.outer, inner * math.prod(old[self.dim + 1 :])
        for dim, size in enumerate(new):
            outer, inner = _quotient(front, new[:dim]), _quotient(back, new[dim + 1 :])
            if outer and inner and size == outer * block * inner:
                if not self.extended:
                    return Rows(dim, outer, inner)
                return self.moved(dim) if outer == inner == 1 else None
        return None


def _quotient(number: int, sizes: Sequence[int]) -> int:
    """Return number / product of sizes, or 0 where it is not whole."""
    product = math.prod(sizes)
    return number // product if product and number % product == 0 else 0
