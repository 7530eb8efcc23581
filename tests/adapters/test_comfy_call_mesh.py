"""The mesh of each model call, by the rows that came; no ranks needed."""

import pytest
import torch

from para_core.attention import MeshRequest, MeshShape


def call_of(num_rows, num_conditionings=1, nested=False):
    x = torch.zeros(num_rows, 4)
    return ([x, x] if nested else x,), {"cond_or_uncond": list(range(num_conditionings))}


@pytest.mark.parametrize(
    ("planned", "request_", "call", "expected"),
    [
        ((2, 1, 1), {}, (2, 2), (2, 1, 1)),
        ((2, 1, 1), {}, (1, 1), (1, 1, 2)),
        ((2, 1, 1), {"batch_parallel": True}, (1, 1), (1, 1, 2)),
        ((1, 1, 2), {"batch_parallel": False}, (2, 2), (1, 1, 2)),
        ((1, 1, 2), {}, (2, 1), (2, 1, 1)),
        ((4, 1, 1), {}, (4, 2), (4, 1, 1)),
        ((2, 1, 2), {}, (2, 2, True), (2, 1, 2)),
        # Shares of 2 rows would have a part of both conditionings, of 3 rows each.
        ((3, 1, 1), {}, (6, 2), (1, 3, 1)),
        ((2, 1, 2), {"ring_degree": 1, "ulysses_degree": 2}, (1, 1), (2, 1, 2)),
    ],
)
def test_rows_that_came_decide(comfy, planned, request_, call, expected):
    from para_core.adapters.comfy_call_mesh import CallMeshes

    meshes = CallMeshes(8, MeshRequest(**request_), MeshShape(*planned), lambda mesh: None)
    assert meshes.of(*call_of(*call)).sizes == expected


def test_a_mesh_is_told_when_it_changes(comfy):
    from para_core.adapters.comfy_call_mesh import CallMeshes

    told = []
    meshes = CallMeshes(8, MeshRequest(), MeshShape(2, 1, 1), told.append)
    for rows in (1, 1, 2, 2, 1):
        meshes.of(*call_of(rows, rows))
    assert [mesh.batch for mesh in told] == [1, 2, 1]
