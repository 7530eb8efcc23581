"""Cases for test_ports.py, and what a stranger finds at a port."""

from __future__ import annotations

import contextlib
import select
import socket

import torch
import torch.distributed as dist

from para_core.adapters.comfy_rank_meshes import RankMeshes
from para_core.attention import MeshShape
from para_core.workers import ports


def takes_connections(port: int) -> bool:
    with socket.socket() as line:
        line.setblocking(False)
        line.connect_ex(("127.0.0.1", port))
        return bool(select.select([], [line], [], 0.2)[1]) and not line.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def opened_by(make) -> tuple[object, list[int]]:
    """What make gave, and the ports on which this process listens since."""
    before = set(ports._listening())
    made = make()
    found = []
    for inode, descriptor in ports._listening().items():
        if inode not in before:
            with socket.socket(fileno=ports.os.dup(descriptor)) as line:
                found.append(line.getsockname()[1])
    return made, found


def group_made(rank: int, world_size: int, *, deaf: bool) -> tuple[list[bool], float]:
    """Whether its ports take connections, and a sum over its ranks."""
    with ports.deaf_afterwards() if deaf else contextlib.nullcontext():
        group, found = opened_by(lambda: dist.new_group(list(range(world_size))))
    return [takes_connections(port) for port in found], sum_of_ranks(rank, group)


def mesh_of_the_service(rank: int, world_size: int) -> tuple[list[bool], float]:
    meshes = RankMeshes("cpu")
    mesh, found = opened_by(lambda: meshes.of(MeshShape(1, 1, world_size)))
    return [takes_connections(port) for port in found], sum_of_ranks(rank, mesh.sequence.group)


def sum_of_ranks(rank: int, group: dist.ProcessGroup) -> float:
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total, group=group)
    return total.item()
