"""Ulysses attention: ranks exchange tokens for heads, attend to the whole sequence, and exchange back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm

import torch.distributed as dist
from torch import Tensor

from .kernels import repeat_heads
from .mesh import Axis

# (q, k, v, which of all query heads these are) -> out
Attend = Callable[[Tensor, Tensor, Tensor, slice], Tensor]


def ulysses_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    axis: Axis,
    lengths: Sequence[int],
    key_lengths: Sequence[int] | None = None,
    attend: Attend,
    max_portions: int = 1,
) -> Tensor:
    """Attention of this rank's queries over the keys of all ranks of the axis; lies in memory as (B, Q, H, D).

    q: (B, H, Q, D); k, v: (B, G, K, D) of this rank, H divisible by the axis' size. lengths, key_lengths: Q and K of
    each rank of the axis, 0 allowed. attend gets the tokens of all ranks and this rank's heads, with strides of its
    own. max_portions: into so many, where the heads divide, so that one travels while another is attended to. A
    portion costs two collectives, or three where keys are divided in another way than queries.
    Source: Jacobs et al., DeepSpeed Ulysses, arXiv 2309.14509.
    """
    if axis.size == 1:
        return attend(q, k, v, slice(None))
    num_groups = lcm(k.shape[1], axis.size)  # GQA: key heads are repeated only as far as every rank needs some
    k, v = repeat_heads(k, num_groups), repeat_heads(v, num_groups)
    count = max(count for count in range(1, max_portions + 1) if num_groups % (count * axis.size) == 0)
    portions = zip(*(x.chunk(count, 1) for x in (q, k, v)), strict=True)
    arriving = [_exchanged(portion, axis, lengths, key_lengths) for portion in portions]
    num_heads = q.shape[1] // count // axis.size
    leaving = []
    for number, exchanges in enumerate(arriving):
        start = (number * axis.size + axis.rank) * num_heads
        portion = [part for exchange in exchanges for part in exchange.wait()]
        leaving.append(HeadsForTokens(attend(*portion, slice(start, start + num_heads)), axis, lengths))
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
    for exchange, place in zip(leaving, out.chunk(count, 2), strict=True):
        exchange.write(place)
    return out.transpose(1, 2)


def _exchanged(
    parts: tuple[Tensor, Tensor, Tensor], axis: Axis, lengths: Sequence[int], key_lengths: Sequence[int] | None
) -> list[TokensForHeads]:
    """q, k and v under way, in one message where they have the same tokens."""
    if key_lengths is None or tuple(key_lengths) == tuple(lengths):
        return [TokensForHeads(parts, axis, lengths)]
    return [TokensForHeads(parts[:1], axis, lengths), TokensForHeads(parts[1:], axis, key_lengths)]


class TokensForHeads:
    """The exchange of this rank's tokens for its share of the heads, of several tensors (B, H, S, D) in one message."""

    def __init__(self, parts: Sequence[Tensor], axis: Axis, lengths: Sequence[int]) -> None:
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


class HeadsForTokens:
    """The exchange back, of (B, H / size, all tokens, D) for this rank's tokens of all heads."""

    def __init__(self, out: Tensor, axis: Axis, lengths: Sequence[int]) -> None:
        num_tokens = lengths[axis.rank]
        self._sent = out.permute(2, 0, 1, 3).contiguous()
        self._received = out.new_empty(axis.size, num_tokens, *self._sent.shape[1:])
        received = self._received.flatten(0, 1)
        self._work = _all_to_all(received, self._sent, axis, ([num_tokens] * axis.size, lengths))

    def write(self, place: Tensor) -> None:
        """Into a tensor (B, S, H, D), once it is there."""
        self._work.wait()
        received = self._received.permute(2, 1, 0, 3, 4)
        place.unflatten(2, received.shape[2:4]).copy_(received)


def _all_to_all(received: Tensor, sent: Tensor, axis: Axis, lengths: tuple[Sequence[int], Sequence[int]]) -> dist.Work:
    """lengths: rows from each rank, rows to each rank."""
    return dist.all_to_all_single(received, sent, *map(list, lengths), group=axis.group, async_op=True)
