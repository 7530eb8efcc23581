"""Ulysses attention: ranks exchange tokens for heads, attend to the whole sequence, and exchange back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm

import torch.distributed as dist
from torch import Tensor

from .kernels import repeat_heads
from .mesh import Axis

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: Axis,
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    attend: Attend,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of the axis.

    q: (B, H, Q, D); k, v: (B, G, K, D) of this rank, H divisible by the axis' size. lengths, key_lengths: Q and K of
    each rank of the axis, 0 allowed. attend gets the tokens of all ranks and this rank's heads, with strides of its
    own. Two collectives, or three where keys are divided in another way than queries.
    Source: Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509.
    """
    if axis.size == 1:
        return attend(q, k, v)
    num_groups = lcm(k.shape[1], axis.size)  # GQA: key heads are repeated only as far as every rank needs some
    k, v = repeat_heads(k, num_groups), repeat_heads(v, num_groups)
    if key_lengths is None or tuple(key_lengths) == tuple(lengths):
        exchanges = [TokensForHeads([q, k, v], axis, lengths)]
    else:
        exchanges = [TokensForHeads([q], axis, lengths), TokensForHeads([k, v], axis, key_lengths)]
    q, k, v = (part for exchange in exchanges for part in exchange.wait())
    return heads_for_tokens(attend(q, k, v), axis, lengths)


class TokensForHeads:
    """The exchange of this rank's tokens for its share of the heads, of several tensors (B, H, S, D) in one message."""

    def __init__(self, parts: list[Tensor], axis: Axis, lengths: Sequence[int]) -> None:
        batch, _, num_tokens, _ = parts[0].shape
        self._shapes = [(part.shape[1] // axis.size, part.shape[3]) for part in parts]
        width = sum(heads * dim for heads, dim in self._shapes)
        # Tokens first: the messages of all ranks, one after the other, are then the whole sequence.
        self._sent = parts[0].new_empty(axis.size, num_tokens, batch, width)
        for place, part in zip(self._split(self._sent), parts, strict=True):
            place.copy_(part.unflatten(1, (axis.size, -1)).permute(1, 3, 0, 2, 4))
        self._received = parts[0].new_empty(sum(lengths), batch, width)
        self._work = _all_to_all(self._received, self._sent.flatten(0, 1), axis, (lengths, [num_tokens] * axis.size))

    def wait(self) -> list[Tensor]:
        """The tensors with all tokens of the axis and this rank's heads, as views of one buffer."""
        self._work.wait()
        return [part.permute(1, 2, 0, 3) for part in self._split(self._received)]

    def _split(self, buffer: Tensor) -> list[Tensor]:
        parts = buffer.split([heads * dim for heads, dim in self._shapes], -1)
        return [part.unflatten(-1, shape) for part, shape in zip(parts, self._shapes, strict=True)]


def heads_for_tokens(out: Tensor, axis: Axis, lengths: Sequence[int]) -> Tensor:
    """This rank's tokens of all heads from (B, H / size, all tokens, D); lies in memory as (B, S, H, D)."""
    sent = out.permute(2, 0, 1, 3).contiguous()
    num_tokens = lengths[axis.rank]
    received = out.new_empty(axis.size * num_tokens, *sent.shape[1:])
    _all_to_all(received, sent, axis, ([num_tokens] * axis.size, lengths)).wait()
    return received.unflatten(0, (axis.size, num_tokens)).permute(2, 1, 0, 3, 4).flatten(2, 3).transpose(1, 2)


def _all_to_all(received: Tensor, sent: Tensor, axis: Axis, lengths: tuple[Sequence[int], Sequence[int]]) -> dist.Work:
    """lengths: rows from each rank, rows to each rank."""
    return dist.all_to_all_single(received, sent, *map(list, lengths), group=axis.group, async_op=True)
