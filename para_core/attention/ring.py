"""Ring attention: every rank keeps its queries, and the blocks of keys and values travel from rank to rank."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .kernels import update_out_and_lse
from .mesh import Axis

# (q, k, v, ring rank whose keys these are) -> (out, lse)
AttendBlock = Callable[[Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]

PATIENCE = 5.0  # seconds that an error waits for what is on its way


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, *, axis: Axis, key_lengths: Sequence[int], attend: AttendBlock
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of the axis.

    q: (B, H, Q, D); k, v: (B, G, K, D) of this rank; key_lengths: K of each rank of the axis, 0 allowed.
    A block is sent on while it is attended to. Blocks are merged in float32, so that ranks may differ in rounding.
    Source: Liu et al., Ring Attention with Blockwise Transformers, arXiv 2310.01889.
    """
    out = lse = None
    block = Block.of(k, v) if axis.size > 1 else None
    for step in range(axis.size):
        source = (axis.rank - step) % axis.size
        transfer = None if step + 1 == axis.size else Transfer(block, axis, key_lengths[(source - 1) % axis.size])
        try:
            block_out, block_lse = attend(q, k, v, source)
            if out is None:
                out, lse = block_out.to(block_lse.dtype), block_lse
            else:
                out, lse = update_out_and_lse(out, lse, block_out, block_lse)
        except BaseException:
            if transfer is not None:
                transfer.settle()
            raise
        if transfer is not None:
            block = transfer.wait()
            k, v = block.keys_and_values()
    return out.to(q.dtype)


@dataclass(frozen=True)
class Block:
    """Keys and values of one rank in one buffer, since a message costs more than its bytes. shapes: of k and v."""

    buffer: Tensor
    shapes: tuple[torch.Size, torch.Size]

    @classmethod
    def of(cls, k: Tensor, v: Tensor) -> Block:
        block = cls(k.new_empty(k.numel() + v.numel()), (k.shape, v.shape))
        for part, x in zip(block.keys_and_values(), (k, v), strict=True):
            part.copy_(x)
        return block

    def like(self, num_keys: int) -> Block:
        """An empty one of another length."""
        shapes = tuple(torch.Size((*shape[:2], num_keys, shape[3])) for shape in self.shapes)
        return Block(self.buffer.new_empty(sum(shape.numel() for shape in shapes)), shapes)

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        k, v = self.buffer.split([shape.numel() for shape in self.shapes])
        return k.view(self.shapes[0]), v.view(self.shapes[1])


class Transfer:
    """A block under way to the next rank of the ring, and one with num_keys keys from the rank before."""

    def __init__(self, block: Block, axis: Axis, num_keys: int) -> None:
        self.sent, self.received = block, block.like(num_keys)
        following, preceding = (axis.ranks[(axis.rank + step) % axis.size] for step in (1, -1))
        operations = [
            (dist.isend, self.sent.buffer, following),
            (dist.irecv, self.received.buffer, preceding),
        ]
        # Both ends know the lengths, so that nothing at all needs no message.
        messages = [dist.P2POp(*operation, group=axis.group) for operation in operations if operation[1].numel()]
        self._works = dist.batch_isend_irecv(messages) if messages else []

    def wait(self) -> Block:
        for work in self._works:
            work.wait()
        return self.received

    def settle(self) -> None:
        """Instead of wait(), before an error leaves: gloo's connection does not survive a message that is dropped.

        For PATIENCE at most, since a rank that has failed elsewhere never answers; then a thread keeps it.
        """
        waiting = threading.Thread(target=self._outlast, name="para-transfer", daemon=True)
        waiting.start()
        waiting.join(PATIENCE)

    def _outlast(self) -> None:
        with contextlib.suppress(RuntimeError):  # the error that leaves says more
            self.wait()
