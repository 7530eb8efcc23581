"""The ranks of a mesh as a sharded model call sees them: whom it gathers tokens from, and who attends together."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch import Tensor

from .attention import LocalAttention, RankMesh, all_gather_sequence, context_attention


class MeshRanks:
    """The ranks that a sequence is split among, in the order of its tokens."""

    def __init__(self, mesh: RankMesh, attention: str = "pytorch") -> None:
        """attention: the host's choice of kernel for a ring, by its name in `attention.BACKENDS`."""
        self.mesh = mesh
        self.rank = mesh.sequence.rank
        self.num_ranks = mesh.sequence.size
        self._attention = attention

    def gather(self, tensor: Tensor, dim: int, lengths: Sequence[int]) -> Tensor:
        """Every rank's tokens along `dim`, in rank order."""
        return all_gather_sequence(tensor, lengths=lengths, axis=self.mesh.sequence, dim=dim)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int],
        *,
        own: LocalAttention | None = None,
        **options,
    ) -> Tensor:
        """Of this rank's queries to every rank's keys. q, k, v: (B, H, S of this rank, D).

        own: the host's function for a single device, scale and the like in it; a mesh without a ring runs with that.
        """
        attention = self._attention if own is None or self.mesh.ring.size > 1 else own
        return context_attention(q, k, v, mesh=self.mesh, lengths=lengths, attention=attention, **options)

    def max(self, values: Tensor) -> Tensor:
        """The largest of each over all ranks of the mesh; the tensor itself is overwritten."""
        for axis in (self.mesh.sequence, self.mesh.batch):
            if axis.group is not None:
                dist.all_reduce(values, op=dist.ReduceOp.MAX, group=axis.group)
        return values

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all ranks of the mesh, whichever tokens and rows they have; the tensor itself is overwritten."""
        for axis in (self.mesh.sequence, self.mesh.batch):
            if axis.size > 1:
                dist.all_reduce(values, group=axis.group)
        return values
