"""What comes out of an operator none of whose arguments is split, but some hold one value only."""

from __future__ import annotations

import torch

from .blank import Blank
from .split_call import SplitCall

FILLS = {f"aten::{name}" for name in "zeros ones full empty new_zeros new_ones new_full new_empty".split()}
SAME = {f"aten::{name}" for name in "slice detach alias".split()}
VIEWS = {f"aten::{name}" for name in "view _reshape_alias permute transpose t unsqueeze squeeze expand select".split()}
COPIES = {f"aten::{name}" for name in "clone _to_copy zeros_like ones_like _unsafe_view repeat".split()}


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
