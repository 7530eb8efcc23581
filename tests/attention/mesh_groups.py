"""What the ranks run about the process groups of a mesh: their timeouts and names, and rings whose kernels raise."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from attention.cases import mesh_of
from torch import Tensor

from para_core.attention import AXES, MeshShape, RankMesh, device_mesh
from para_core.attention.kernels import attention_with_lse
from para_core.attention.mesh import set_timeout


def timeouts(rank: int, world_size: int, *, shape: tuple[int, int, int], seconds: float) -> dict[str, float]:
    """Of the groups of a mesh, in seconds, where the default group has so many."""
    original = _seconds(dist.group.WORLD)
    set_timeout(dist.group.WORLD, timedelta(seconds=seconds))
    try:
        mesh = RankMesh.of(device_mesh("cpu", MeshShape(*shape)))
        return {name: _seconds(getattr(mesh, name).group) for name in (*AXES, "sequence")}
    finally:
        set_timeout(dist.group.WORLD, timedelta(seconds=original))


def _seconds(group: dist.ProcessGroup) -> float:
    return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def sums_with_former_names(rank: int, world_size: int) -> tuple[float, int]:
    """Over the sequence of a mesh that is made after a group of some ranks, named as in torch before July 2026.

    Names of groups that only their members make had the number of groups that a rank is in.
    Source: pytorch/pytorch#189073. And how many groups a second look at the mesh makes.
    """
    with _former_names():
        dist.new_group([0, *range(2, world_size)])
        device = device_mesh("cpu", MeshShape(1, 2, world_size // 2))
        total = torch.ones(1)
        dist.all_reduce(total, group=RankMesh.of(device).sequence.group)
        count = dist.distributed_c10d._world.group_count
        RankMesh.of(device)
        return total.item(), dist.distributed_c10d._world.group_count - count


@contextmanager
def _former_names() -> Iterator[None]:
    core = dist.distributed_c10d
    original = core._hash_ranks_to_str

    def former(ranks: list[int]) -> str:
        text = "_".join(map(str, [*ranks, len(core._world.pg_names)]))
        return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()

    core._hash_ranks_to_str = former
    try:
        yield
    finally:
        core._hash_ranks_to_str = original


def ring_with_late_rank(rank: int, world_size: int, *, patience: float) -> tuple[str, float, bool]:
    """What a rank raises whose neighbours come to the ring only afterwards, when, and whether the next ring is right.

    Rank 0 raises; the others raise once it has.
    """
    from para_core.attention import ring

    axis = mesh_of((1, world_size, 1)).ring
    q, original = torch.randn(1, 2, 6, 8), ring.PATIENCE

    def refuse(q: Tensor, k: Tensor, v: Tensor, source: int) -> tuple[Tensor, Tensor]:
        raise MemoryError(f"rank {rank} is out of memory")

    def attend(q: Tensor, k: Tensor, v: Tensor, source: int) -> tuple[Tensor, Tensor]:
        return attention_with_lse(q, k, v)

    def run(attend: ring.AttendBlock) -> Tensor:
        return ring.ring_attention(q, q, q, axis=axis, key_lengths=[6] * world_size, attend=attend)

    ring.PATIENCE, said = patience, ""
    try:
        if rank:
            dist.barrier()
        begun = time.monotonic()
        try:
            run(refuse)
        except MemoryError as error:
            said = str(error)
        taken = time.monotonic() - begun
        if not rank:
            dist.barrier()
        right = torch.allclose(run(attend), torch.nn.functional.scaled_dot_product_attention(q, q, q))
        return said, taken, right
    finally:
        ring.PATIENCE = original


def portions_with_error(rank: int, world_size: int) -> bool:
    """Whether Ulysses is right after errors that left a portion of the heads on its way."""
    from para_core.attention import ulysses

    axis = mesh_of((1, 1, world_size)).ulysses
    q = torch.randn(1, 4 * world_size, 50, 16)

    def run(refused: int) -> Tensor:
        def attend(q: Tensor, k: Tensor, v: Tensor, heads: slice) -> Tensor:
            if heads.start // 2 // world_size == refused:
                raise MemoryError
            return torch.nn.functional.scaled_dot_product_attention(q, k, v)

        lengths = [50] * world_size
        return ulysses.ulysses_attention(q, q, q, axis=axis, lengths=lengths, attend=attend, max_portions=2)

    expected, right = run(-1), []
    for refused in (0, 1, 0, 1):
        try:
            run(refused)
        except MemoryError:
            right.append(torch.equal(run(-1), expected))
    return right == [True] * 4
