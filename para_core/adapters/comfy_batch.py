"""ComfyUI on a rank: the rows of a model call that are this rank's, and all rows gathered again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..attention import RankMesh, all_gather_sequence

Call = tuple[tuple, Mapping[str, object]]


@dataclass(frozen=True)
class BatchShare:
    """A model call's part that this rank computes: whole conditionings, or equal parts of one.

    call: the arguments of this rank's rows, with their conditionings in the transformer options.
    num_groups: into how many parts the rows are cut; where the batch axis has more ranks, some compute the same part.
    """

    call: Call
    num_groups: int
    mesh: RankMesh

    @classmethod
    def of(cls, mesh: RankMesh, call: Call) -> BatchShare:
        """call: positional and keyword arguments of the diffusion model, the same on every rank."""
        args, kwargs = call
        options = kwargs.get("transformer_options") or {}
        num_rows = _rows(args[0])
        num_conditionings = len(options.get("cond_or_uncond", [0]))
        num_groups = _num_groups(num_rows, num_conditionings, mesh.batch.size)
        if num_groups == 1:
            return cls(call, 1, mesh)
        length = num_rows // num_groups
        start = mesh.batch.rank % num_groups * length
        cut = _Rows(num_rows, start, length)
        rows_each = num_rows // num_conditionings
        mine = slice(start // rows_each, (start + length - 1) // rows_each + 1)
        options = {**options, **{name: options[name][mine] for name in ("cond_or_uncond", "uuids") if name in options}}
        local = {name: value if name == "transformer_options" else cut.of(value) for name, value in kwargs.items()}
        return cls((cut.of(args), {**local, "transformer_options": options}), num_groups, mesh)

    def gather(self, output: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Every row, from this rank's; of a list, each tensor's."""
        if self.num_groups == 1:
            return output
        if not isinstance(output, Tensor):
            return [self.gather(part) for part in output]
        lengths = [output.shape[0]] * self.mesh.batch.size
        rows = all_gather_sequence(output, axis=self.mesh.batch, lengths=lengths, dim=0)
        return rows[: self.num_groups * output.shape[0]]


@dataclass(frozen=True)
class _Rows:
    """Some rows of a batch of `total`."""

    total: int
    start: int
    length: int

    def of(self, value: object) -> object:
        """These rows of every tensor in it that has one for each of the batch; the rest as it is."""
        if isinstance(value, Tensor):
            whole = value.ndim == 0 or value.shape[0] != self.total
            return value if whole else value[self.start : self.start + self.length]
        if isinstance(value, dict):
            return {name: self.of(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(part) for part in value)
        return value


def _rows(x: Tensor | list[Tensor]) -> int:
    return x.shape[0] if isinstance(x, Tensor) else x[0].shape[0]


def _num_groups(num_rows: int, num_conditionings: int, num_ranks: int) -> int:
    """As many equal parts as there are ranks for, none of them with a part of one conditioning and more of another."""
    each = num_rows // num_conditionings
    fitting = (
        count
        for count in range(min(num_ranks, num_rows), 0, -1)
        if num_rows % count == 0 and (each % (num_rows // count) == 0 or (num_rows // count) % each == 0)
    )
    return next(fitting)
