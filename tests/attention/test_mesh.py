"""The mesh: the literature's arrangement, the automatic choice, what is refused, and a rank's place in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from para_core.attention import MeshRequest, MeshShape, RankMesh, choose_mesh, context_attention
from para_core.attention import init_context_parallel_mesh as init_mesh
from para_core.attention.mesh import greedy_shape


@pytest.mark.parametrize(
    ("world_size", "maxima", "expected"),
    [
        (8, {}, (1, 1, 8)),
        (2, {"max_ring": 2}, (1, 2, 1)),
        (8, {"max_ring": 2}, (1, 2, 4)),
        (8, {"max_batch": 2, "max_ring": 2}, (2, 2, 2)),
        (4, {"max_batch": 2}, (2, 1, 2)),
        (8, {"max_batch": 16}, (8, 1, 1)),
        (6, {"max_batch": 4}, (3, 1, 2)),
        (8, {"max_ulysses": 2}, (1, 4, 2)),
        (8, {"max_batch": 2, "max_ulysses": 1}, (2, 4, 1)),
        (1, {"max_batch": 2, "max_ring": 2, "max_ulysses": 2}, (1, 1, 1)),
    ],
)
def test_batch_then_ring_then_ulysses(world_size, maxima, expected):
    assert greedy_shape(world_size, **maxima).sizes == expected


def test_ranks_that_no_axis_takes_are_refused():
    with pytest.raises(ValueError, match="8 ranks leave 4 for Ulysses.*allows 2"):
        greedy_shape(8, max_ring=2, max_ulysses=2)
    with pytest.raises(ValueError, match="max_ring_dim_size is 0; allowed are whole numbers from 1"):
        greedy_shape(8, max_ring=0)


def test_mesh_without_process_group_is_refused():
    with pytest.raises(ValueError, match="no process group.*torchrun"):
        init_mesh("cpu")


@pytest.mark.parametrize(
    ("world_size", "num_heads", "num_rows", "request_", "expected"),
    [
        (1, 24, 1, {}, (1, 1, 1)),
        (2, 24, 1, {}, (1, 1, 2)),
        (2, 24, 2, {}, (2, 1, 1)),
        (4, 24, 2, {}, (2, 1, 2)),
        (4, 24, 2, {"batch_parallel": False}, (1, 1, 4)),
        (4, 24, 3, {}, (1, 1, 4)),
        (2, 25, 1, {}, (1, 2, 1)),  # heads that do not divide: ring
        (4, 30, 1, {}, (1, 2, 2)),
        (5, 24, 1, {}, (1, 5, 1)),
        (8, 24, 2, {"ring_degree": 2}, (2, 2, 2)),
        (8, 24, 2, {"ring_degree": 8}, (1, 8, 1)),
        (8, 24, 1, {"ulysses_degree": 2}, (1, 4, 2)),
        (8, 24, 2, {"ring_degree": 2, "ulysses_degree": 2, "batch_parallel": True}, (2, 2, 2)),
    ],
)
def test_choice_has_the_least_communication(world_size, num_heads, num_rows, request_, expected):
    shape = choose_mesh(world_size, num_heads=num_heads, num_rows=num_rows, request=MeshRequest(**request_))
    assert shape.sizes == expected


@pytest.mark.parametrize(
    ("num_heads", "num_rows", "request_", "message"),
    [
        (30, 1, {"ulysses_degree": 4}, "4 does not divide the model's 30 heads; allowed on 4 ranks are 1, 2"),
        (24, 1, {"batch_parallel": True}, r"batch_parallel is on, but 1 row\(s\) a call do not divide among 4 ranks"),
        (24, 1, {"ring_degree": 3}, "ring_degree 3 does not arrange 4 ranks.*allowed are batch 1 x ring 1 x Ulysses 4"),
        (24, 2, {"ring_degree": 4, "batch_parallel": True}, "ring_degree 4, batch_parallel True does not arrange"),
        (24, 2, {"ulysses_degree": 1, "ring_degree": 2, "batch_parallel": False}, "batch_parallel False does not"),
    ],
)
def test_request_that_no_mesh_meets_is_refused(num_heads, num_rows, request_, message):
    with pytest.raises(ValueError, match=message):
        choose_mesh(4, num_heads=num_heads, num_rows=num_rows, request=MeshRequest(**request_))


@pytest.mark.parametrize(("num_rows", "num_conditionings", "batch"), [(6, 2, 1), (6, 1, 3), (6, 3, 3), (6, 6, 3)])
def test_no_rank_has_a_part_of_one_conditioning_and_more_of_another(num_rows, num_conditionings, batch):
    mesh = choose_mesh(3, num_heads=24, num_rows=num_rows, num_conditionings=num_conditionings)
    assert mesh.batch == batch


def test_negative_degree_is_refused():
    with pytest.raises(ValueError, match="ring_degree is -1; allowed are whole numbers from 0"):
        MeshRequest(ring_degree=-1)


def test_empty_axis_is_refused():
    with pytest.raises(ValueError, match="axis below 1"):
        MeshShape(ring=0)


def test_one_rank_needs_no_process_group():
    q, k, v = (torch.randn(1, 2, 7, 8) for _ in range(3))
    mesh = RankMesh()
    assert mesh.shape == MeshShape(1, 1, 1)
    out = context_attention(q, k, v, mesh=mesh, lengths=[7])
    assert torch.equal(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_lengths_that_contradict_the_tensors_are_refused():
    q = torch.randn(1, 2, 7, 8)
    with pytest.raises(ValueError, match=r"rank 0 of 1 has 7 queries, the lengths are \(6,\)"):
        context_attention(q, q, q, mesh=RankMesh(), lengths=[6])
    with pytest.raises(ValueError, match=r"rank 0 of 1 has 7 keys, the lengths are \(7, 7\)"):
        context_attention(q, q, q, mesh=RankMesh(), lengths=[7], key_lengths=[7, 7])
    with pytest.raises(ValueError, match="2 query heads and 1 key heads.*enable_gqa"):
        context_attention(q, q[:, :1], q[:, :1], mesh=RankMesh(), lengths=[7])


def test_ranks_of_every_axis(gloo_ranks):
    places = gloo_ranks(4).run("attention.cases.places", shape=(1, 2, 2))
    assert [place["sequence"] for place in places] == [(0, 1, 2, 3)] * 4
    assert [place["ulysses"] for place in places] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [place["ring"] for place in places] == [(0, 2), (1, 3), (0, 2), (1, 3)]
    places = gloo_ranks(4).run("attention.cases.places", shape=(2, 1, 2))
    assert [place["sequence"] for place in places] == [(0, 1), (0, 1), (2, 3), (2, 3)]
    assert [place["batch"] for place in places] == [(0, 2), (1, 3), (0, 2), (1, 3)]


def test_mesh_of_the_literature_on_ranks(gloo_ranks):
    maxima = {"max_batch_dim_size": 2, "max_ring_dim_size": 2}
    names = ("batch", "ring", "ulysses")
    assert gloo_ranks(4).run("attention.cases.mesh_of_literature", maxima=maxima) == [((2, 2, 1), names)] * 4


@pytest.mark.parametrize("shape", [(1, 2, 2), (2, 1, 2), (2, 1, 1)], ids=str)
def test_groups_have_the_timeout_of_the_default_group(gloo_ranks, shape):
    size = shape[0] * shape[1] * shape[2]
    found = gloo_ranks(size).run("attention.mesh_groups.timeouts", shape=shape, seconds=77.0)
    assert found == [dict.fromkeys(("batch", "ring", "ulysses", "sequence"), 77.0)] * size


def test_mesh_is_made_where_ranks_are_in_different_numbers_of_groups(gloo_ranks):
    """Of torch before July 2026, which salted the names of groups with that number."""
    assert gloo_ranks(4).run("attention.mesh_groups.sums_with_former_names") == [(4.0, 0)] * 4


@pytest.fixture
def as_rank() -> Iterator[Callable[[int, int], None]]:
    """as_rank(rank, world_size): this process is that one of ranks that do not exist."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def become(rank: int, world_size: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield become
    if dist.is_initialized():
        dist.destroy_process_group()


def test_every_rank_makes_the_groups_of_all_batch_rows_in_one_order(as_rank, monkeypatch):
    import torch.distributed as dist

    made, new_group = {}, dist.new_group
    for rank in range(8):
        as_rank(rank, 8)
        mesh, made[rank] = init_mesh("cpu", max_batch_dim_size=2, max_ring_dim_size=2), []

        def recorded(ranks, *, made=made[rank], **options):
            made.append((ranks, sorted(options)))
            return new_group(ranks, **options)

        monkeypatch.setattr(dist, "new_group", recorded)
        assert RankMesh.of(mesh).sequence.ranks == tuple(range(rank // 4 * 4, rank // 4 * 4 + 4))
    assert all(groups == [([0, 1, 2, 3], ["timeout"]), ([4, 5, 6, 7], ["timeout"])] for groups in made.values())


def test_mesh_that_is_a_part_of_a_larger_one(as_rank):
    from torch.distributed.device_mesh import init_device_mesh

    for rank in (0, 6):
        as_rank(rank, 8)
        axes = ("batch", "ring", "ulysses")
        mesh = init_device_mesh("cpu", (2, 1, 2, 2), mesh_dim_names=("replica", *axes))[axes]
        assert RankMesh.of(mesh).sequence.ranks == tuple(range(rank // 4 * 4, rank // 4 * 4 + 4))
