"""Decoding in slices: each kind of layer is exact across ranks, or refused by name before anything runs."""

from __future__ import annotations

import functools

import pytest
import torch

from para_core.parallel_vae import CannotSplit, check_supported, obstacle, parallel_decode
from para_core.parallel_vae.ranks import split
from para_core.parallel_vae.rows import Rows

from .layers import EXACT, REFUSED, build, latent

TOLERANCE = 5e-6  # float32; statistics and attention add in another order
HALF_TOLERANCE = 4e-3  # one unit in the last place of bfloat16


@pytest.fixture(scope="module")
def errors(gloo_ranks):
    """(number of ranks, dim, inference mode?) -> for each rank the errors by name of the layer."""
    return functools.cache(
        lambda num_ranks, dim, inference: gloo_ranks(num_ranks).run(
            "parallel_vae.cases.errors", dim=dim, inference=inference
        )
    )


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("num_ranks, dim, inference", [(2, -2, True), (4, -2, False), (4, -1, True)])
def test_layer_is_exact_across_ranks(errors, num_ranks, dim, inference, name):
    for found in errors(num_ranks, dim, inference):
        error, same_shape = found[name]
        assert same_shape
        assert error <= (HALF_TOLERANCE if name == "half precision inside" else TOLERANCE)


@pytest.mark.parametrize("name", EXACT)
def test_rehearsal_finds_nothing_against_an_exact_layer(name):
    assert obstacle(build(EXACT[name]).eval(), latent(), num_ranks=4, dim=-2) is None


@pytest.mark.parametrize("inference", [True, False], ids=["inference", "no grad"])
@pytest.mark.parametrize("name", REFUSED)
def test_layer_that_mixes_rows_is_refused_by_name(name, inference):
    make, message = REFUSED[name]
    layer = build(make)
    with torch.inference_mode(inference), pytest.raises(CannotSplit, match=message):
        check_supported(layer, latent(), dim=-2)


def test_rehearsal_computes_nothing_and_leaves_the_decoder_alone():
    decoder = build(EXACT["attention"])
    before = {key: value.clone() for key, value in decoder.state_dict().items()}
    huge = torch.empty(1, 4, 1 << 20, 8, device="meta")
    assert obstacle(decoder, latent().expand(2, 4, 10, 9), dim=-2) is None
    assert obstacle(build(EXACT["convolution"]).to("meta"), huge, dim=-2) is None
    assert all(torch.equal(value, before[key]) for key, value in decoder.state_dict().items())
    assert not any("forward" in vars(module) for module in decoder.modules())


def test_rows_that_do_not_divide_are_shared_out(gloo_ranks):
    assert [seen for _, _, seen in gloo_ranks(4).run("parallel_vae.cases.calls", rows=11)] == [[3], [3], [3], [2]]
    assert split(10, 4) == (3, 3, 2, 2)


def test_too_few_rows_are_decoded_whole_on_every_rank(gloo_ranks):
    for shape, error, seen in gloo_ranks(4).run("parallel_vae.cases.calls", rows=7):
        assert (shape, error, seen) == ((2, 4, 7, 9), 0.0, [7])


def test_only_the_destination_gets_the_whole(gloo_ranks):
    shapes = [shape for shape, _, _ in gloo_ranks(4).run("parallel_vae.cases.calls", rows=10, destination=2)]
    assert shapes == [(2, 4, 3, 9), (2, 4, 3, 9), (2, 4, 10, 9), (2, 4, 2, 9)]


def test_compiled_decoder_runs_as_written(gloo_ranks):
    for _, error, seen in gloo_ranks(2).run("parallel_vae.cases.calls", rows=10, compiled=True):
        assert error < TOLERANCE and seen == [5]


def test_groups_do_not_meet(gloo_ranks):
    assert max(gloo_ranks(4).run("parallel_vae.cases.in_subgroups")) < 1e-5


def test_refusal_leaves_everything_as_it_was(gloo_ranks):
    for text, error in gloo_ranks(2).run("parallel_vae.cases.refused_then_decoded"):
        assert text.startswith("this decoder: aten::flip changes the order of the rows")
        assert error < 1e-5


def test_one_process_decodes_plainly():
    decoder = build(REFUSED["roll"][0])
    assert torch.equal(parallel_decode(decoder, latent()), decoder(latent()))
    assert obstacle(decoder, latent(), num_ranks=1) is None


def test_batch_and_channels_are_no_rows():
    with pytest.raises(ValueError, match=r"dim 1 of a latent of shape \(2, 4, 10, 9\) is batch or channels"):
        parallel_decode(build(EXACT["convolution"]), latent(), dim=1)


@pytest.mark.parametrize(
    "rows, old, new, expected",
    [
        (Rows(2), (1, 4, 5, 9), (1, 4, 45), Rows(2, 1, 9)),
        (Rows(3), (1, 4, 9, 5), (1, 4, 45), Rows(2, 9, 1)),
        (Rows(2, 9, 1), (1, 4, 45), (1, 4, 9, 5), Rows(3)),
        (Rows(2, 1, 2), (1, 4, 10, 3), (1, 4, 5, 2, 3), Rows(2)),
        (Rows(2), (1, 1, 5, 1), (5,), Rows(0)),
        (Rows(2, 1, 2), (1, 4, 10, 3), (1, 4, 2, 5, 3), None),
        (Rows(2, 1, 1, 1, 1), (1, 4, 7, 3), (4, 7, 3), Rows(1, 1, 1, 1, 1)),
        (Rows(2, 1, 1, 1, 1), (1, 4, 7, 3), (4, 21), None),
    ],
)
def test_rows_are_followed_through_a_view(rows, old, new, expected):
    assert rows.viewed(5, old, new) == expected
