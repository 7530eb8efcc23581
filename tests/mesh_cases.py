"""Cases for test_mesh_ranks.py."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def ranks_of(shape: tuple[int, int, int]):
    from torch.distributed.device_mesh import init_device_mesh

    from para_core.attention import AXES, RankMesh
    from para_core.mesh_ranks import MeshRanks

    return MeshRanks(RankMesh.of(init_device_mesh("cpu", shape, mesh_dim_names=AXES)))


def largest(rank: int, world_size: int, *, shape: tuple[int, int, int]) -> list[float]:
    return ranks_of(shape).max(torch.tensor([float(rank), float(-rank)])).tolist()


def quantized(rank: int, world_size: int, *, lengths: Sequence[int]) -> tuple[float, float]:
    """Relative errors of this rank's tokens in generated code: by the scale of all ranks, and by its own."""
    from para_core.quantization import quantize
    from para_core.quantization_scheme import SCHEMES
    from para_core.sharded_operators import largest_magnitude, operators_of

    weight = quantize(torch.randn(16, 32), SCHEMES["fp8_dynamic_per_tensor"])
    x = torch.randn(2, sum(lengths), 32)
    x[:, : lengths[0]] *= 3
    part, expected = (value.split(tuple(lengths), 1)[rank] for value in (x, weight.linear(x)))

    @torch.compile(fullgraph=True, dynamic=False)
    def block(x):
        return weight.linear(x, None, largest_magnitude(x))

    with operators_of(ranks_of((1, world_size, 1))):
        output = block(part)
    assert output.shape == expected.shape
    return tuple(
        float((found - expected).norm() / expected.norm().clamp(min=1e-9)) for found in (output, weight.linear(part))
    )
