"""What the ranks count while they attend to a divided sequence: messages, bytes, graphs, what overlaps."""

from __future__ import annotations

from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from attention.cases import Problem, both, mesh_of
from torch import Tensor

from para_core.attention import context_attention, slice_of
from para_core.attention.kernels import attention_with_lse


def num_overlapped(rank: int, world_size: int) -> list[str]:
    """The order of events of one ring call: the next block must be under way before this one is attended to."""
    from para_core.attention import ring

    events: list[str] = []

    class Recorded(ring.Transfer):
        def __init__(self, *arguments) -> None:
            events.append("send")
            super().__init__(*arguments)

        def wait(self) -> ring.Block:
            events.append("wait")
            return super().wait()

    def attend(q: Tensor, k: Tensor, v: Tensor, source: int) -> tuple[Tensor, Tensor]:
        events.append("attend")
        return attention_with_lse(q, k, v)

    q, axis = torch.randn(1, 2, 6, 8), mesh_of((1, world_size, 1)).ring
    with mock.patch.object(ring, "Transfer", Recorded):
        ring.ring_attention(q, q, q, axis=axis, key_lengths=[6] * world_size, attend=attend)
    return events


def num_messages(rank: int, world_size: int, *, problem: Problem) -> tuple[int, int]:
    """All-to-alls, and messages to and from neighbours, that one call costs this rank."""
    counts = [0, 0]
    originals = dist.all_to_all_single, dist.batch_isend_irecv

    def all_to_all_single(*arguments, **kwargs):
        counts[0] += 1
        return originals[0](*arguments, **kwargs)

    def batch_isend_irecv(messages):
        counts[1] += len(messages)
        return originals[1](messages)

    with mock.patch.multiple(dist, all_to_all_single=all_to_all_single, batch_isend_irecv=batch_isend_irecv):
        both(problem)
    return tuple(counts)


def sent_bytes(rank: int, world_size: int, *, problem: Problem) -> tuple[int, int]:
    """What one call sends to other ranks: in all-to-alls, and round the ring."""
    counts = [0, 0]
    originals = dist.all_to_all_single, dist.P2POp

    def all_to_all_single(received, sent, to_receive, to_send, *, group, async_op):
        own = dist.get_rank(group)
        counts[0] += sum(rows * sent[0].numel() * sent.itemsize for number, rows in enumerate(to_send) if number != own)
        return originals[0](received, sent, to_receive, to_send, group=group, async_op=async_op)

    def message(operation, tensor, peer, *, group):
        counts[1] += tensor.numel() * tensor.itemsize * (operation is dist.isend)
        return originals[1](operation, tensor, peer, group=group)

    with mock.patch.multiple(dist, all_to_all_single=all_to_all_single, P2POp=message):
        both(problem)
    return tuple(counts)


def num_graphs(rank: int, world_size: int, *, shape: tuple[int, int, int]) -> int:
    """Of a compiled function around attention, whose result must be that of the function as it is."""
    mesh, lengths, graphs = mesh_of(shape), (5, 4), []

    def block(x: Tensor) -> Tensor:
        q, k, v = (x * 2).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        return context_attention(q, k, v, mesh=mesh, lengths=lengths).transpose(1, 2).flatten(2).relu()

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(1, lengths[rank], 192)
    assert torch.equal(torch.compile(block, backend=backend)(x), block(x))
    return len(graphs)


def in_portions(rank: int, world_size: int, *, problem: Problem, max_portions: int) -> tuple[bool, list[str]]:
    """Whether Ulysses with its heads in portions equals SDPA, and its order of events."""
    from para_core.attention import ulysses

    events, originals = [], (ulysses.TokensForHeads.wait, dist.all_to_all_single)
    q, k, v = problem.tensors()
    mask, share = problem.whole_mask(), slice_of(problem.lengths, rank)

    def all_to_all_single(*arguments, **kwargs):
        events.append("send")
        return originals[1](*arguments, **kwargs)

    def wait(exchange: ulysses.TokensForHeads) -> list[Tensor]:
        events.append("wait")
        return originals[0](exchange)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
        events.append("attend")
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, heads], enable_gqa=True)

    with (
        mock.patch.object(ulysses.TokensForHeads, "wait", wait),
        mock.patch.object(dist, "all_to_all_single", all_to_all_single),
    ):
        out = ulysses.ulysses_attention(
            *(x[:, :, share] for x in (q, k, v)),
            axis=mesh_of(problem.shape).ulysses,
            lengths=problem.lengths,
            attend=attend,
            max_portions=max_portions,
        )
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return torch.equal(out, expected[:, :, share]), events
