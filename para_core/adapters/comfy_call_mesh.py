"""ComfyUI: how the ranks share each model call of a run, by the rows that the host has really put into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from ..attention import MeshRequest, MeshShape, choose_mesh


@dataclass
class CallMeshes:
    """The host puts conditionings into one call where their shapes and what is free of its device's memory allow it,
    which is known with the call only. Rows apart help where there are several; one row is spread by its tokens.

    planned: the mesh of calls as the request expects them; also of a call for whose rows the request has none.
    told: with the mesh of the first call, and of each that has another than the one before.
    """

    num_heads: int
    request: MeshRequest
    planned: MeshShape
    told: Callable[[MeshShape], None]
    _latest: MeshShape | None = field(default=None, init=False)

    def of(self, args: tuple, options: Mapping[str, object]) -> MeshShape:
        """For the arguments of a diffusion model and its transformer options."""
        x = args[0] if isinstance(args[0], Tensor) else args[0][0]  # a nested latent is a list
        mesh = self.choose(x.shape[0], len(options.get("cond_or_uncond", [0])))
        if mesh != self._latest:
            self._latest = mesh
            self.told(mesh)
        return mesh

    def choose(self, num_rows: int, num_conditionings: int = 1) -> MeshShape:
        """For a call of so many rows."""
        for request in (self.request, replace(self.request, batch_parallel=None)):
            try:
                return choose_mesh(
                    self.planned.world_size,
                    num_heads=self.num_heads,
                    num_rows=num_rows,
                    num_conditionings=num_conditionings,
                    request=request,
                )
            except ValueError:
                pass
        return self.planned
