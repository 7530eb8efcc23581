"""Cases for test_mesh_ranks.py."""

from __future__ import annotations

import torch


def largest(rank: int, world_size: int, *, shape: tuple[int, int, int]) -> list[float]:
    from torch.distributed.device_mesh import init_device_mesh

    from para_core.attention import AXES, RankMesh
    from para_core.mesh_ranks import MeshRanks

    mesh = RankMesh.of(init_device_mesh("cpu", shape, mesh_dim_names=AXES))
    return MeshRanks(mesh).max(torch.tensor([float(rank), float(-rank)])).tolist()
