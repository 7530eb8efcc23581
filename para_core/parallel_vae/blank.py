"""Tensors that hold one value only, as zeros to pad a video with: they fit any split."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .rows import Rows

if TYPE_CHECKING:
    from .split_call import SplitCall

FILLS = {f"aten::{name}" for name in "zeros ones full empty new_zeros new_ones new_full new_empty".split()}
SAME = {f"aten::{name}" for name in "slice detach alias".split()}
VIEWS = {f"aten::{name}" for name in "view _reshape_alias permute transpose t unsqueeze squeeze expand select".split()}
COPIES = {f"aten::{name}" for name in "clone _to_copy zeros_like ones_like _unsafe_view repeat".split()}


class Blank:
    """A tensor filled with one value, which becomes split once split rows are written to it.

    Slices share it. Other views are frozen: what is written to them could not be told from here.
    """

    def __init__(self, shape: torch.Size, *, frozen: bool = False) -> None:
        self.shape, self.frozen = shape, frozen
        self.rows: Rows | None = None
        self.spoiled = False

    def accepts(self, out: Tensor, rows: Rows) -> bool:
        """Whether split rows may be written to out, which is the blank or a slice of it."""
        fits = out.ndim == len(self.shape) and out.shape[rows.dim] == self.shape[rows.dim]
        return fits and not self.frozen and self.rows in (None, rows)


def blank_call(call: SplitCall) -> object:
    """Run an operator whose arguments are blank or the same on all ranks."""
    out = call.run()
    if call.func._schema.is_mutable:
        blank = call.ledger.blank_of(call.input)
        if blank and not all(call.is_blank(tensor) for tensor in call.tensors()):
            blank.spoiled = True
        return out
    if call.name in SAME and (blank := call.ledger.blank_of(call.input)):
        return call.ledger.note(out, blank)
    if call.name in VIEWS:
        return call.ledger.note(out, Blank(out.shape, frozen=True))
    is_pointwise = torch.Tag.pointwise in call.func.tags and all(call.is_blank(tensor) for tensor in call.tensors())
    if call.name in COPIES or is_pointwise:
        return call.ledger.note(out, Blank(out.shape))
    return out
