"""Runs a decoder's own code on one rank's slice of the latent, and makes each operator exact across the ranks."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from .blank import Blank
from .ranks import Ranks
from .rows import Rows
from .rules_blank import FILLS, blank_call
from .rules_layers import RULES as LAYER_RULES
from .rules_products import RULES as PRODUCT_RULES
from .rules_shapes import RULES as SHAPE_RULES
from .rules_shapes import pointwise
from .split_call import SplitCall

RULES = SHAPE_RULES | LAYER_RULES | PRODUCT_RULES


class SplitMode(TorchDispatchMode):
    """Within the context every operator of torch on tensors that stem from `enter` follows its rule, or is refused.

    Tensors are ordinary and have the rank's local shape, so the decoder's code runs as it is; nothing of it is
    patched. Which dim holds the rows is kept beside them, for as long as they live.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self.ranks = ranks
        self._entries = WeakTensorKeyDictionary()

    def enter(self, z: Tensor, dim: int) -> Tensor:
        """Return this rank's slice of a latent that every rank has whole."""
        return self.note(z.narrow(dim, self.ranks.start, self.ranks.own_units).contiguous(), Rows(dim))

    def entry_of(self, tensor: Tensor) -> Rows | Blank | None:
        """Return what is known of a tensor; None where it is the same on all ranks."""
        entry = self._entries.get(tensor)
        if not isinstance(entry, Blank):
            return entry
        return None if entry.spoiled else entry.rows or entry

    def note(self, tensor: Tensor, entry: Rows | Blank) -> Tensor:
        """Remember where a tensor's rows are, and return it; rows written to a blank tensor are the whole blank's."""
        before = self._entries.get(tensor)
        if isinstance(before, Blank) and isinstance(entry, Rows):
            before.rows = entry
        else:
            self._entries[tensor] = entry
        return tensor

    def blank_of(self, tensor: Tensor) -> Blank | None:
        """Return the blank that a tensor is, or was before it was written to."""
        entry = self._entries.get(tensor)
        return entry if isinstance(entry, Blank) else None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func._schema.name
        if name in FILLS:
            out = func(*args, **kwargs)
            return self.note(out, Blank(out.shape))
        entries = [self.entry_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if not any(entries) or name == "prim::device":
            return func(*args, **kwargs)
        rule = RULES.get(name) or (pointwise if torch.Tag.pointwise in func.tags else None)
        if rule is None:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        call = SplitCall(self, func, args, kwargs)
        if not any(isinstance(entry, Rows) for entry in entries):
            return blank_call(call)
        if rule is None:
            raise call.refusal("is not known to be exact on slices")
        return rule(call)
