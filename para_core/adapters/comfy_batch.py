"""ComfyUI on a rank: the rows of a model call that are this rank's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from ..attention import RankMesh
from ..batch_rows import BatchRows

Call = tuple[tuple, Mapping[str, object]]


@dataclass(frozen=True)
class BatchShare:
    """A model call's part that this rank computes.

    call: the arguments of this rank's rows, with their conditionings in the transformer options.
    """

    call: Call
    rows: BatchRows

    @classmethod
    def of(cls, mesh: RankMesh, call: Call, *, even: bool = False) -> BatchShare:
        """call: positional and keyword arguments of the diffusion model, the same on every rank. even: `BatchRows`'."""
        args, kwargs = call
        options = kwargs.get("transformer_options") or {}
        x = args[0] if isinstance(args[0], Tensor) else args[0][0]  # a nested latent is a list
        rows = BatchRows(mesh, x.shape[0], len(options.get("cond_or_uncond", [0])), even)
        if rows.num_groups == 1:
            return cls(call, rows)
        mine = {name: options[name][rows.conditionings] for name in ("cond_or_uncond", "uuids") if name in options}
        local = {name: value if name == "transformer_options" else rows.of(value) for name, value in kwargs.items()}
        return cls((rows.of(args), {**local, "transformer_options": {**options, **mine}}), rows)

    def gather(self, output: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Every row's output, from this rank's."""
        return self.rows.gather(output)
