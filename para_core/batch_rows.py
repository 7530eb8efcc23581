"""The rows of a batch that are a rank's own on the batch axis of a mesh, and all rows gathered again."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .attention import RankMesh, all_gather_sequence, rows_divide


@dataclass(frozen=True)
class BatchRows:
    """This rank's equal share of num_rows rows: whole conditionings, or a part of one.

    num_conditionings: how many the rows belong to, equally many rows each, in order.
    num_groups: into how many shares the rows are cut; where the axis has more ranks, some have the same one. even: then
    every share is on as many ranks, so that sums over all ranks are in proportion to those over the rows.
    """

    mesh: RankMesh
    num_rows: int
    num_conditionings: int = 1
    even: bool = False

    @property
    def num_groups(self) -> int:
        """As many as there are ranks for, none of them with a part of one conditioning and more of another."""
        return next(
            count
            for count in range(min(self.mesh.batch.size, self.num_rows), 0, -1)
            if rows_divide(self.num_rows, self.num_conditionings, count)
            and (not self.even or self.mesh.batch.size % count == 0)
        )

    @property
    def rows(self) -> slice:
        length = self.num_rows // self.num_groups
        start = self.mesh.batch.rank % self.num_groups * length
        return slice(start, start + length)

    @property
    def conditionings(self) -> slice:
        """Those that this rank's rows belong to."""
        each = self.num_rows // self.num_conditionings
        return slice(self.rows.start // each, (self.rows.stop - 1) // each + 1)

    def of(self, value: object) -> object:
        """These rows of every tensor in it that has one for each of the batch; the rest as it is."""
        if isinstance(value, Tensor):
            return value[self.rows] if value.ndim and value.shape[0] == self.num_rows else value
        if isinstance(value, dict):
            return {name: self.of(part) for name, part in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.of(part) for part in value)
        return value

    def gather(self, output: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Every row, from this rank's; of a list, each tensor's."""
        if self.num_groups == 1:
            return output
        if not isinstance(output, Tensor):
            return [self.gather(part) for part in output]
        lengths = [output.shape[0]] * self.mesh.batch.size
        return all_gather_sequence(output, axis=self.mesh.batch, lengths=lengths, dim=0)[: self.num_rows]
