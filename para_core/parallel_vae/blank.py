"""Tensors that hold one value only, as zeros to pad a video with: they fit any split."""

from __future__ import annotations

from torch import Size, Tensor

from .rows import Rows


class Blank:
    """A tensor filled with one value, which becomes split once split rows are written to it.

    Slices share it. Other views are frozen: what is written to them could not be told from here.
    """

    def __init__(self, shape: Size, *, frozen: bool = False) -> None:
        self.shape, self.frozen = shape, frozen
        self.rows: Rows | None = None
        self.spoiled = False

    def accepts(self, out: Tensor, rows: Rows) -> bool:
        """Whether split rows may be written to out, which is the blank or a slice of it."""
        fits = out.ndim == len(self.shape) and out.shape[rows.dim] == self.shape[rows.dim]
        return fits and not self.frozen and self.rows in (None, rows)
