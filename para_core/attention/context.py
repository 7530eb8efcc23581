"""Context-parallel attention on a mesh: Ulysses, ring, or ring over Ulysses (USP), chosen by the mesh's sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import attention_with_lse, require_lse
from .masks import additive, part_of
from .mesh import RankMesh
from .ring import ring_attention
from .sequence import slice_of
from .ulysses import ulysses_attention

# (q, k, v, mask or None) -> out: attention of one device over all keys
LocalAttention = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]

# Of the heads, on devices that move data while they compute. Two hide half of the exchange; more cost more messages.
PORTIONS = 2
# Bytes of a portion on a CPU: glibc maps anything from 32 MB on anew, and every page of it is a fault. At 4,608 tokens
# on two ranks the exchanges of FLUX's heads take 68 ms of CPU in two portions, and 118 ms in one.
CPU_PORTION = 24 * 2**20


@torch.compiler.disable  # tracing into point-to-point messages takes a minute and breaks at each of them
def context_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: RankMesh,
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention: str | LocalAttention = "pytorch",
) -> Tensor:
    """Attention over a sequence that is divided among the ranks of mesh.sequence; returns this rank's rows.

    q: (B, H, Q, D); k, v: (B, H, K, D) of this rank's tokens, with fewer heads where enable_gqa is set. lengths: Q of
    each rank in rank order, 0 allowed; key_lengths: K of each rank where that differs (cross-attention). mask: bool
    (True: attend) or additive, broadcastable to (B, H, all queries or 1, all keys), tokens in rank order; a query that
    sees no key gets 0. attention: a name of `kernels.BACKENDS`, or on a mesh without a ring any function.
    More parameters than usual, since scaled_dot_product_attention's come on top. For inference: no gradients;
    under torch.compile the graph breaks here once.
    Raises ValueError for shapes that contradict the lengths, for heads that do not divide, and for an attention that
    gives no log-sum-exp on a ring.
    """
    call = _Call(mesh, tuple(lengths), tuple(lengths if key_lengths is None else key_lengths), mask, scale, attention)
    call.check(q, k, enable_gqa)
    group = slice(mesh.ring.rank * mesh.ulysses.size, (mesh.ring.rank + 1) * mesh.ulysses.size)
    return ulysses_attention(
        q,
        k,
        v,
        axis=mesh.ulysses,
        lengths=call.lengths[group],
        key_lengths=call.key_lengths[group],
        attend=call.on_ring if mesh.ring.size > 1 else call.local,
        max_portions=call.max_portions(q, k, call.lengths[group]),
    )


@dataclass(frozen=True)
class _Call:
    """One call's arguments, for the ranks of one Ulysses group after they have exchanged tokens for heads."""

    mesh: RankMesh
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...]
    mask: Tensor | None
    scale: float | None
    attention: str | LocalAttention

    def check(self, q: Tensor, k: Tensor, enable_gqa: bool) -> None:
        size, rank = self.mesh.sequence.size, self.mesh.sequence.rank
        for name, x, lengths in (("queries", q, self.lengths), ("keys", k, self.key_lengths)):
            if len(lengths) != size or lengths[rank] != x.shape[2]:
                raise ValueError(
                    f"rank {rank} of {size} has {x.shape[2]} {name}, the lengths are {lengths}; needed is one length "
                    "a rank, this rank's own at its place. Divide the sequence by balanced_lengths."
                )
        if q.shape[1] % self.mesh.ulysses.size:
            raise ValueError(
                f"{q.shape[1]} heads do not divide among {self.mesh.ulysses.size} ranks of Ulysses; allowed is a "
                "divisor of the heads. Choose the mesh by choose_mesh, which uses a ring instead."
            )
        if q.shape[1] != k.shape[1] and not (enable_gqa and q.shape[1] % k.shape[1] == 0):
            raise ValueError(
                f"{q.shape[1]} query heads and {k.shape[1]} key heads; allowed are equal numbers, or a divisor with "
                "enable_gqa=True. Set enable_gqa, or repeat the keys."
            )
        if self.mesh.ring.size > 1:
            require_lse(self.attention if isinstance(self.attention, str) else repr(self.attention))

    def max_portions(self, q: Tensor, k: Tensor, group_lengths: tuple[int, ...]) -> int:
        """In which Ulysses sends its heads: from what all its ranks know, as all must send the same."""
        if q.is_cuda:
            # Not beside a ring: its messages would share the link, on a communicator of their own.
            return PORTIONS if self.mesh.ring.size == 1 else 1
        num_heads = (q.shape[1] + 2 * k.shape[1]) / self.mesh.ulysses.size
        received = sum(group_lengths) * num_heads * q.shape[0] * q.shape[3] * q.itemsize
        return 1 + int(received / CPU_PORTION)

    def local(self, q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
        """Over all keys at once: without a ring this is the single device's own attention, head by head."""
        mask = None if self.mask is None else part_of(self.mask, heads=heads)
        if callable(self.attention):
            return self.attention(q, k, v, mask)
        if self.attention != "pytorch":
            return attention_with_lse(q, k, v, mask=mask, scale=self.scale, backend=self.attention)[0]
        if mask is not None and mask.is_floating_point():
            mask = additive(mask, q.dtype)
        gqa = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale, enable_gqa=gqa)

    def on_ring(self, q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
        rows = slice_of(self._ring_lengths(self.lengths), self.mesh.ring.rank)
        key_lengths = self._ring_lengths(self.key_lengths)
        mask = None if self.mask is None else part_of(self.mask, heads=heads)

        def attend(q: Tensor, k: Tensor, v: Tensor, source: int) -> tuple[Tensor, Tensor]:
            part = None if mask is None else part_of(mask, rows=rows, keys=slice_of(key_lengths, source))
            return attention_with_lse(q, k, v, mask=part, scale=self.scale, backend=self.attention)

        return ring_attention(q, k, v, axis=self.mesh.ring, key_lengths=key_lengths, attend=attend)

    def _ring_lengths(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens of each Ulysses group."""
        size = self.mesh.ulysses.size
        return tuple(sum(lengths[start : start + size]) for start in range(0, len(lengths), size))
