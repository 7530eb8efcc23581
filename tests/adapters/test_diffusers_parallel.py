"""A diffusers pipeline on the ranks of a mesh: the pictures are those of one device, with the cache too."""

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

TOLERANCE = 2e-6  # of the picture after several steps; each forward's is 1e-6
RING, ULYSSES, BATCH = (1, 2, 1), (1, 1, 2), (2, 1, 1)


@pytest.fixture
def on_ranks(gloo_ranks):
    return lambda case, num_ranks=2, **settings: gloo_ranks(num_ranks).run(
        f"adapters.diffusers_cases.{case}", timeout=120.0, **settings
    )


@pytest.mark.parametrize("mesh", [RING, ULYSSES], ids=["ring", "ulysses"])
def test_two_ranks_equal_one(on_ranks, mesh):
    (error, first), (other, second) = on_ranks("compare", mesh=mesh)
    assert max(error, other) <= TOLERANCE
    assert (first, second) == ({(1, 20)}, {(1, 20)})


def test_rows_of_a_batch_go_to_ranks_of_their_own(on_ranks):
    for error, seen in on_ranks("compare", mesh=BATCH, batch=2):
        assert error <= TOLERANCE
        assert seen == {(1, 40)}


@pytest.mark.parametrize(("mesh", "batch"), [(RING, 1), (ULYSSES, 1), (BATCH, 2)], ids=["ring", "ulysses", "rows"])
def test_one_scale_for_the_tokens_and_rows_of_all_ranks(on_ranks, mesh, batch):
    """Of one step. float32's rounding makes few codes flip; where each rank scales by its own, it is 0.7 and more."""
    for error, own_error in on_ranks("quantized", mesh=mesh, batch=batch, scheme="fp8_dynamic_per_tensor"):
        assert error <= 0.5 * own_error


def test_mesh_is_chosen_by_the_heads(on_ranks):
    """Three heads do not divide among two ranks, so that a ring takes them."""
    for error, seen in on_ranks("compare", num_heads=3):
        assert error <= TOLERANCE
        assert seen == {(1, 20)}


@pytest.mark.parametrize(("mesh", "batch"), [(RING, 1), (BATCH, 2)], ids=["ring", "batch"])
@pytest.mark.parametrize("parallel_first", [True, False])
def test_cache_and_ranks_in_either_order(on_ranks, parallel_first, mesh, batch):
    (error, reused, output), (other, _, same) = on_ranks(
        "cached", mesh=mesh, parallel_first=parallel_first, batch=batch
    )
    alone, here = reused
    assert any(alone) and not all(alone[1:])
    assert here == alone
    assert max(error, other) <= 1e-5
    assert torch.equal(output, same)


@pytest.mark.parametrize(("mesh", "parallel_first"), [(RING, True), (ULYSSES, False)], ids=["ring", "ulysses"])
def test_compiled_blocks_and_ranks_in_either_order(on_ranks, mesh, parallel_first):
    for error, num_kinds, compiled in on_ranks("compiled", mesh=mesh, parallel_first=parallel_first):
        assert error <= TOLERANCE
        assert (num_kinds, compiled) == (2, [])


def test_what_cannot_be_split_is_refused_by_name(on_ranks):
    for control, heads in on_ranks("refused", mesh=ULYSSES):
        assert control.startswith("`controlnet_block_samples` cannot be split among ranks")
        assert heads.startswith("3 heads do not divide among 2 ranks of Ulysses")
