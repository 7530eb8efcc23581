"""One operation on split tensors: its arguments by name, where their rows are, and the ways to run or refuse it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Protocol

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from .blank import Blank
from .ranks import Ranks
from .rows import Rows


class CannotSplit(ValueError):
    """The decoder does something with the split rows that is not known to be exact."""


class Ledger(Protocol):
    """Where the rows of every tensor are."""

    ranks: Ranks

    def entry_of(self, tensor: Tensor) -> Rows | Blank | None:
        """Return what is known of a tensor; None where it is the same on all ranks."""
        ...

    def blank_of(self, tensor: Tensor) -> Blank | None:
        """Return the blank that a tensor is, or was before rows were written to it."""
        ...

    def note(self, tensor: Tensor, entry: Rows | Blank) -> Tensor:
        """Remember where a tensor's rows are, and return it."""
        ...


class SplitCall:
    """An operator of torch that was called with at least one split tensor."""

    def __init__(self, ledger: Ledger, func: OpOverload, args: tuple, kwargs: dict) -> None:
        self.ledger, self.ranks, self.func = ledger, ledger.ranks, func
        schema = func._schema.arguments
        given = dict(zip((argument.name for argument in schema), args, strict=False)) | kwargs
        self._schema = schema
        self.values = {a.name: given.get(a.name, a.default_value) for a in schema}

    def __getitem__(self, name: str):
        return self.values[name]

    @property
    def name(self) -> str:
        """The operator without its overload, as in aten::cat."""
        return self.func._schema.name

    @property
    def input_name(self) -> str:
        """The name of the first argument."""
        return self._schema[0].name

    @property
    def input(self) -> Tensor:
        """The first argument."""
        return self.values[self.input_name]

    def tensors(self) -> Iterator[Tensor]:
        """All tensors among the arguments."""
        return (value for value in tree_leaves(list(self.values.values())) if isinstance(value, Tensor))

    def rows(self, tensor: Tensor | None) -> Rows | None:
        """Return where a tensor's rows are; None where it is not split."""
        entry = None if tensor is None else self.ledger.entry_of(tensor)
        return entry if isinstance(entry, Rows) else None

    def is_blank(self, tensor: Tensor) -> bool:
        """Whether a tensor holds one value only."""
        return isinstance(self.ledger.entry_of(tensor), Blank)

    def input_rows(self) -> Rows:
        """Return the rows of the first argument, which must be the only split one."""
        others = [tensor for tensor in self.tensors() if tensor is not self.input and self.rows(tensor)]
        rows = self.rows(self.input)
        if rows is None or others:
            raise self.refusal("takes split rows in another argument than its first")
        return rows

    def run(self, /, **changed: object):
        """Run the operator on this rank, some arguments exchanged."""
        values = self.values | changed
        positional = [values[a.name] for a in self._schema if not a.kwarg_only]
        return self.func(*positional, **{a.name: values[a.name] for a in self._schema if a.kwarg_only})

    def note(self, out: Tensor, rows: Rows) -> Tensor:
        """Remember the rows of a result, and return it."""
        if out.shape[rows.dim] != rows.size(self.ranks.own_units):
            raise self.refusal(f"gives {out.shape[rows.dim]} rows for {rows.size(self.ranks.own_units)}")
        blank = self.ledger.blank_of(out)
        if blank and not blank.accepts(out, rows):
            raise self.refusal("writes rows to a part of a tensor that is not split like them")
        return self.ledger.note(out, rows)

    def gathered(self, tensor: Tensor) -> Tensor:
        """Return a split tensor whole: the rows of all ranks, in order."""
        rows = self.rows(tensor)
        if rows.extended:
            raise self.refusal("needs all rows of a padded tensor")
        parts = tensor.unflatten(rows.dim, (rows.outer, -1))
        return self.ranks.gather(parts, rows.dim + 1, rows.inner).flatten(rows.dim, rows.dim + 1)

    def refusal(self, why: str) -> CannotSplit:
        """Return the error that names the module and the operator."""
        return CannotSplit(
            f"{_innermost_module()}: {self.name} {why}; only decoders whose layers are exact on slices can be split "
            "over several devices: decode this VAE on one device"
        )


def _innermost_module() -> str:
    """Name the module whose forward is running, and the outermost one around it."""
    names, frame = [], sys._getframe()
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, nn.Module) and type(found).__name__ not in names:
            names.append(type(found).__name__)
        frame = frame.f_back
    return " of ".join(dict.fromkeys((names[0], names[-1]))) if names else "this decoder"
