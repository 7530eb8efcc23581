"""Which rows of a batch are a rank's own; no ranks needed."""

import pytest
import torch

from para_core.attention import Axis, RankMesh
from para_core.batch_rows import BatchRows


def shares(num_ranks, *batch, **settings):
    ranks = tuple(range(num_ranks))
    return [BatchRows(RankMesh(batch=Axis(rank, ranks)), *batch, **settings) for rank in ranks]


@pytest.mark.parametrize(
    ("num_ranks", "num_rows", "num_conditionings", "expected"),
    [
        (2, 2, 2, [(0, 1), (1, 2)]),
        (2, 4, 2, [(0, 2), (2, 4)]),
        (4, 4, 2, [(0, 1), (1, 2), (2, 3), (3, 4)]),
        (4, 2, 2, [(0, 1), (1, 2), (0, 1), (1, 2)]),
        (2, 3, 1, [(0, 3), (0, 3)]),
        (3, 3, 3, [(0, 1), (1, 2), (2, 3)]),
        # Thirds would have a part of both conditionings in the second.
        (3, 6, 2, [(0, 3), (3, 6), (0, 3)]),
        (2, 1, 1, [(0, 1), (0, 1)]),
    ],
)
def test_shares_are_equal_and_of_whole_conditionings(num_ranks, num_rows, num_conditionings, expected):
    found = shares(num_ranks, num_rows, num_conditionings)
    assert [(share.rows.start, share.rows.stop) for share in found] == expected


@pytest.mark.parametrize(("num_rows", "num_groups"), [(3, 1), (6, 2), (2, 2), (4, 4)])
def test_even_shares_are_on_equally_many_ranks(num_rows, num_groups):
    found = shares(4, num_rows, even=True)
    assert len({share.rows.start for share in found}) == found[0].num_groups == num_groups


def test_conditionings_of_the_rows():
    assert [share.conditionings for share in shares(2, 4, 2)] == [slice(0, 1), slice(1, 2)]
    assert [share.conditionings for share in shares(4, 4, 2)] == [slice(0, 1)] * 2 + [slice(1, 2)] * 2
    assert [share.conditionings for share in shares(2, 4, 4)] == [slice(0, 2), slice(2, 4)]


def test_rows_are_taken_wherever_a_tensor_has_them():
    share = shares(2, 2)[1]
    tensor, mask, scalar = torch.randn(2, 3), torch.ones(1, 3), torch.tensor(2.0)
    given = {"list": [tensor, None, mask], "pair": (tensor, 2), "scalar": scalar, "name": "text"}
    rows = share.of(given)
    assert rows["list"][0].equal(tensor[1:]) and rows["list"][1] is None and rows["list"][2] is mask
    assert rows["pair"][0].equal(tensor[1:]) and rows["pair"][1] == 2
    assert rows["scalar"] is scalar and rows["name"] == "text"


def test_conditionings_of_a_comfyui_call_go_with_their_rows(comfy):
    from para_core.adapters.comfy_batch import BatchShare

    options = {"cond_or_uncond": [1, 0], "uuids": ["negative", "positive"], "sigmas": torch.ones(2)}
    call = (torch.randn(2, 4), torch.ones(2)), {"context": torch.randn(2, 5), "transformer_options": options}
    for rank in range(2):
        share = BatchShare.of(RankMesh(batch=Axis(rank, (0, 1))), call)
        (x, timestep), kwargs = share.call
        assert x.equal(call[0][0][rank : rank + 1]) and timestep.shape == (1,)
        assert kwargs["context"].equal(call[1]["context"][rank : rank + 1])
        own = kwargs["transformer_options"]
        assert (own["cond_or_uncond"], own["uuids"]) == ([1 - rank], [["negative", "positive"][rank]])
        assert own["sigmas"] is options["sigmas"]
    assert options["uuids"] == ["negative", "positive"]
