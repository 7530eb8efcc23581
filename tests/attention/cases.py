"""What the ranks run: attention over a divided sequence, beside SDPA over the whole one."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from para_core.attention import AXES, RankMesh, all_gather_sequence, context_attention, slice_of


@dataclass(frozen=True)
class Problem:
    """shape: of the mesh. lengths: tokens of each rank of a sequence; key_lengths: where keys have other ones."""

    shape: tuple[int, int, int]
    lengths: tuple[int, ...]
    key_lengths: tuple[int, ...] | None = None
    mask: str = ""
    heads: int = 4
    key_heads: int = 4
    dim: int = 16
    rows: int = 2
    scale: float | None = None
    dtype: torch.dtype = torch.float32
    attention: str = "pytorch"

    def tensors(self) -> list[Tensor]:
        """q, k, v of the whole sequence, the same on every rank; scores of +-10 make the attention peaked."""
        keys = sum(self.key_lengths or self.lengths)
        shapes = (self.heads, sum(self.lengths)), (self.key_heads, keys), (self.key_heads, keys)
        q, k, v = (torch.randn(self.rows, heads, tokens, self.dim).to(self.dtype) for heads, tokens in shapes)
        return [q * 4, k, v]

    def whole_mask(self) -> Tensor | None:
        """Every kind leaves some keys out, or weighs them; "blind" hides all keys from some queries."""
        queries, keys = sum(self.lengths), sum(self.key_lengths or self.lengths)
        if not self.mask:
            return None
        if self.mask == "keys":
            return (torch.arange(keys) % 5 != 1).expand(self.rows, 1, 1, keys)
        if self.mask == "block":  # the first rank's keys are hidden from everybody
            return (torch.arange(keys) >= (self.key_lengths or self.lengths)[0]).expand(1, 1, 1, keys)
        if self.mask == "additive":
            return torch.randn(1, 1, queries, keys).masked_fill(torch.rand(1, 1, queries, keys) < 0.2, -torch.inf)
        if self.mask == "minimum":  # as text encoders give it: finite, and -inf only in a shorter dtype
            return torch.zeros(self.rows, 1, 1, keys).masked_fill(torch.arange(keys) % 3 == 0, torch.finfo().min)
        if self.mask == "heads":
            return torch.rand(self.rows, self.heads, queries, keys) < 0.5
        if self.mask == "plane":
            return torch.rand(queries, keys) < 0.5
        assert self.mask == "blind", self.mask
        return (torch.rand(self.rows, 1, queries, keys) < 0.5) & (torch.arange(queries) % 4 != 2)[:, None]


@functools.cache
def mesh_of(shape: tuple[int, int, int]) -> RankMesh:
    return RankMesh.of(init_device_mesh("cpu", shape, mesh_dim_names=AXES))


def both(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's rows: of the divided attention, of SDPA over everything, and of SDPA in float64."""
    mesh = mesh_of(problem.shape)
    q, k, v = problem.tensors()
    mask, gqa = problem.whole_mask(), problem.heads != problem.key_heads
    share = problem.rows // mesh.batch.size
    rows = slice(mesh.batch.rank * share, (mesh.batch.rank + 1) * share)
    queries = slice_of(problem.lengths, mesh.sequence.rank)
    keys = slice_of(problem.key_lengths or problem.lengths, mesh.sequence.rank)
    own_mask = mask[rows] if mask is not None and mask.dim() == 4 and mask.shape[0] > 1 else mask
    out = context_attention(
        q[rows, :, queries],
        k[rows, :, keys],
        v[rows, :, keys],
        mesh=mesh,
        lengths=problem.lengths,
        key_lengths=problem.key_lengths,
        mask=own_mask,
        scale=problem.scale,
        enable_gqa=gqa,
        attention=problem.attention,
    )
    references = [_sdpa(problem, (q, k, v), mask, dtype)[rows, :, queries] for dtype in (problem.dtype, torch.float64)]
    assert out.shape == references[0].shape and out.dtype == problem.dtype
    return out, *references


def _sdpa(problem: Problem, tensors: tuple[Tensor, ...], mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    q, k, v = (x.to(dtype) for x in tensors)
    bias = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    gqa = problem.heads != problem.key_heads
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=problem.scale, enable_gqa=gqa)


def errors(rank: int, world_size: int, *, problem: Problem) -> tuple[float, float, float]:
    """Largest difference to SDPA, to float64, and of SDPA to float64, relative to the largest output."""
    out, plain, exact = both(problem)
    if not out.numel():
        return 0.0, 0.0, 0.0
    differences = out - plain, out - exact, plain - exact
    return tuple((difference.abs().max() / exact.abs().max()).item() for difference in differences)


def is_bit_equal(rank: int, world_size: int, *, problem: Problem) -> bool:
    out, plain, _ = both(problem)
    return torch.equal(out, plain)


def with_function(rank: int, world_size: int, *, problem: Problem) -> list[tuple[int, ...]]:
    """The shapes that a function of the caller's sees; its result must come back as this rank's rows."""
    repeats = problem.heads // problem.key_heads
    mesh, seen = mesh_of(problem.shape), []

    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen.extend(tuple(x.shape) for x in (q, k, v, mask))
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1) * 2

    q, k, v = (x[:, :, slice_of(problem.lengths, rank)] for x in problem.tensors())
    out = context_attention(
        q, k, v, mesh=mesh, lengths=problem.lengths, mask=problem.whole_mask(), enable_gqa=True, attention=attention
    )
    assert torch.equal(out, v.repeat_interleave(repeats, 1) * 2)
    return seen


def refusal(rank: int, world_size: int, *, shape: tuple[int, int, int], attention: str, heads: int) -> str:
    """What a call that must be refused says, on every rank and before any of them waits for another."""
    q = torch.randn(1, heads, 5, 8)
    try:
        context_attention(q, q, q, mesh=mesh_of(shape), lengths=[5] * world_size, attention=attention)
    except ValueError as error:
        return str(error)
    return ""


def gathered(rank: int, world_size: int, *, lengths: tuple[int, ...], dim: int) -> bool:
    shape = [3, 2, 4]
    shape[dim] = sum(lengths)
    whole = torch.randn(shape)
    axis = mesh_of((1, world_size, 1)).sequence
    place = [slice(None)] * 3
    place[dim] = slice_of(lengths, rank)
    return torch.equal(all_gather_sequence(whole[tuple(place)], axis=axis, lengths=lengths, dim=dim), whole)


def places(rank: int, world_size: int, *, shape: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
    """Global ranks of the axes this rank is on, proved by a collective on each."""
    mesh = mesh_of(shape)
    found = {}
    for name in (*AXES, "sequence"):
        axis = getattr(mesh, name)
        members = torch.zeros(world_size, dtype=torch.int64)
        members[rank] = 1 + axis.rank
        dist.all_reduce(members, group=axis.group)
        assert (
            members[list(axis.ranks)].tolist() == list(range(1, axis.size + 1)) and members.count_nonzero() == axis.size
        )
        found[name] = axis.ranks
    return found


def mesh_of_literature(
    rank: int, world_size: int, *, maxima: dict[str, int]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    from para_core.attention import init_context_parallel_mesh

    mesh = init_context_parallel_mesh("cpu", **maxima)
    return tuple(mesh.shape), mesh.mesh_dim_names
