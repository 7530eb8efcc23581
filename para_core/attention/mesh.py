"""The mesh of ranks with the axes batch, ring and ulysses: its shape, and one rank's place in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from math import prod

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

AXES = ("batch", "ring", "ulysses")


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the axes. Ranks that differ only in ring and ulysses share one sequence: rank-major, ulysses fastest."""

    batch: int = 1
    ring: int = 1
    ulysses: int = 1

    def __post_init__(self) -> None:
        if min(self.sizes) < 1:
            raise ValueError(f"{self} has an axis below 1; allowed are whole numbers from 1. Use 1 for an unused axis.")

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.batch, self.ring, self.ulysses

    @property
    def world_size(self) -> int:
        return prod(self.sizes)

    def __str__(self) -> str:
        return f"batch {self.batch} x ring {self.ring} x Ulysses {self.ulysses}"


@dataclass(frozen=True)
class Axis:
    """One axis as this rank sees it. rank: its place there; ranks: global ranks in order; group: None if alone."""

    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: ProcessGroup | None = field(default=None, compare=False)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @classmethod
    def of(cls, group: ProcessGroup) -> Axis:
        return cls(dist.get_rank(group), tuple(dist.get_process_group_ranks(group)), group)


@dataclass(frozen=True)
class RankMesh:
    """This rank's place in a mesh; `RankMesh()` is a rank that is alone, for which every collective is left out.

    sequence: ring and ulysses together, the ranks among which the tokens of one sample are divided, in their order.
    """

    batch: Axis = Axis()
    ring: Axis = Axis()
    ulysses: Axis = Axis()
    sequence: Axis = Axis()

    @property
    def shape(self) -> MeshShape:
        return MeshShape(self.batch.size, self.ring.size, self.ulysses.size)

    @classmethod
    def of(cls, mesh: DeviceMesh) -> RankMesh:
        """From a mesh of `init_context_parallel_mesh`.

        Collective: makes groups where batch, ring and Ulysses are all used. Raises ValueError for other axes, or for
        ranks that are not in ascending order.
        """
        if mesh.mesh_dim_names != AXES:
            raise ValueError(
                f"the mesh has the axes {mesh.mesh_dim_names}; needed are {AXES}. Use init_context_parallel_mesh."
            )
        ranks = mesh.mesh.flatten().tolist()
        if ranks != sorted(ranks):
            raise ValueError(
                f"the mesh has the ranks {ranks}; needed is ascending order, as init_device_mesh makes it."
            )
        batch, ring, ulysses = (Axis.of(mesh.get_group(name)) for name in AXES)
        return cls(batch, ring, ulysses, _sequence(mesh, batch, ring, ulysses))


def _sequence(mesh: DeviceMesh, batch: Axis, ring: Axis, ulysses: Axis) -> Axis:
    if ulysses.size == 1 or ring.size == 1:
        return ring if ulysses.size == 1 else ulysses
    rows, timeout = mesh.mesh.flatten(1).tolist(), default_timeout(mesh.device_type)
    if len(rows[0]) == dist.get_world_size():
        return Axis.of(dist.group.WORLD)
    if mesh.size() == dist.get_world_size():
        # Every rank makes all rows' groups, as names are counted; those that only members make had another number of
        # groups in it on each rank (before pytorch#189073).
        return Axis.of([dist.new_group(row, timeout=timeout) for row in rows][batch.rank])
    # A part of a larger mesh, whose other ranks do not come here.
    return Axis.of(dist.new_group(rows[batch.rank], timeout=timeout, use_local_synchronization=True))


def init_context_parallel_mesh(
    device_type: str,
    *,
    max_batch_dim_size: int | None = None,
    max_ring_dim_size: int | None = None,
    max_ulysses_dim_size: int | None = None,
) -> DeviceMesh:
    """Arrange all ranks of the default process group in a mesh with the axes "batch", "ring" and "ulysses".

    batch is the largest divisor of the world size that is at most max_batch_dim_size (None: 1); ring the largest
    divisor of what is left that is at most max_ring_dim_size; ulysses takes the rest. So on 8 ranks, no maximum gives
    1 x 1 x 8, max_ring_dim_size=2 gives 1 x 2 x 4, and max_batch_dim_size=2 with max_ring_dim_size=2 gives 2 x 2 x 2.
    Without max_ring_dim_size the ring is as small as max_ulysses_dim_size allows: 1 where that is None as well.
    Raises ValueError where no process group exists or the rest is more than max_ulysses_dim_size.
    """
    if not dist.is_initialized():
        raise ValueError(
            "there is no process group to arrange; needed is one rank per device. "
            "Start the script with torchrun and call torch.distributed.init_process_group first."
        )
    maxima = max_batch_dim_size, max_ring_dim_size, max_ulysses_dim_size
    shape = greedy_shape(dist.get_world_size(), *maxima)
    return device_mesh(device_type, shape)


def device_mesh(device_type: str, shape: MeshShape) -> DeviceMesh:
    """All ranks of the default process group in this shape. Collective: makes groups with that one's timeout.

    init_device_mesh alone gives them torch's own, which is 10 or 30 minutes.
    """
    mesh = init_device_mesh(device_type, shape.sizes, mesh_dim_names=AXES)
    timeout = default_timeout(device_type)
    for name in AXES:
        if timeout is not None and mesh.get_group(name) is not dist.group.WORLD:
            set_timeout(mesh.get_group(name), timeout)
    return mesh


def default_timeout(device_type: str) -> timedelta | None:
    """Of the default process group, for what runs on such a device; None where its backend does not tell."""
    try:
        return dist.group.WORLD._get_backend(torch.device(device_type)).options._timeout
    except (AttributeError, RuntimeError):
        return None


def set_timeout(group: ProcessGroup, timeout: timedelta) -> None:
    """For the operations of a group from now on."""
    if hasattr(dist, "set_timeout"):  # torch 2.14
        dist.set_timeout(timeout, group)
    else:
        dist.distributed_c10d._set_pg_timeout(timeout, group)


def greedy_shape(
    world_size: int, max_batch: int | None = None, max_ring: int | None = None, max_ulysses: int | None = None
) -> MeshShape:
    """The shape that `init_context_parallel_mesh` describes."""
    for name, maximum in (("batch", max_batch), ("ring", max_ring), ("ulysses", max_ulysses)):
        if maximum is not None and maximum < 1:
            raise ValueError(f"max_{name}_dim_size is {maximum}; allowed are whole numbers from 1, or None.")
    batch = max(size for size in divisors(world_size) if size <= (max_batch or 1))
    rest = world_size // batch
    limit = rest if max_ulysses is None else max_ulysses
    if max_ring is None:
        ring = min(size for size in divisors(rest) if rest // size <= limit)
    else:
        ring = max(size for size in divisors(rest) if size <= max_ring)
    if rest // ring > limit:
        raise ValueError(
            f"{world_size} ranks leave {rest // ring} for Ulysses beside batch {batch} and ring {ring}; "
            f"max_ulysses_dim_size allows {max_ulysses}. Raise a maximum, or start fewer ranks."
        )
    return MeshShape(batch, ring, rest // ring)


def divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
