"""What the ranks of a mesh find out together."""

import pytest
import torch

from para_core.attention import RankMesh
from para_core.mesh_ranks import MeshRanks


@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1)], ids=str)
def test_largest_is_over_tokens_and_rows(gloo_ranks, shape):
    assert gloo_ranks(4).run("mesh_cases.largest", shape=shape) == [[3.0, 0.0]] * 4


@pytest.mark.parametrize("lengths", [(5, 4), (9, 0)], ids=str)
def test_compiled_layers_scale_by_the_largest_on_all_ranks(gloo_ranks, lengths):
    """A rank without tokens takes part too."""
    (error, own), (other, others_own) = gloo_ranks(2).run("mesh_cases.quantized", lengths=lengths, timeout=180.0)
    assert max(error, other) <= 1e-6
    assert own <= 1e-6, "it has the largest"
    assert (others_own > 1e-2) == (lengths[1] > 0)


def test_a_rank_alone_asks_nobody():
    assert MeshRanks(RankMesh()).max(torch.tensor([2.0])).tolist() == [2.0]
