"""Attention over a divided sequence equals SDPA over the whole one, on real processes, for any lengths."""

from __future__ import annotations

import re

import pytest
import torch
from attention.cases import Problem

from para_core.attention import Axis, RankMesh
from para_core.attention.context import _Call

RING2, ULYSSES2 = (1, 2, 1), (1, 1, 2)
RING4, ULYSSES4, USP, WITH_BATCH = (1, 4, 1), (1, 1, 4), (1, 2, 2), (2, 2, 1)
MASKS = ("keys", "block", "additive", "minimum", "heads", "plane", "blind")
ROUNDING = 1e-6  # relative, of float32 sums in another order


def run(gloo_ranks, case: str, problem: Problem) -> list:
    size = problem.shape[0] * problem.shape[1] * problem.shape[2]
    return gloo_ranks(size).run(f"attention.{case}", problem=problem)


def largest(gloo_ranks, problem: Problem) -> float:
    return max(error for error, _, _ in run(gloo_ranks, "cases.errors", problem))


@pytest.mark.parametrize("shape", [RING2, ULYSSES2], ids=["ring", "ulysses"])
@pytest.mark.parametrize("mask", ["", *MASKS])
def test_two_ranks_equal_sdpa(gloo_ranks, shape, mask):
    assert largest(gloo_ranks, Problem(shape, (49, 48), mask=mask)) <= ROUNDING


@pytest.mark.parametrize("shape", [RING4, ULYSSES4, USP, WITH_BATCH], ids=["ring", "ulysses", "usp", "batch"])
@pytest.mark.parametrize("mask", ["", *MASKS])
def test_four_ranks_equal_sdpa(gloo_ranks, shape, mask):
    lengths = (52, 51) if shape == WITH_BATCH else (26, 25, 25, 25)
    assert largest(gloo_ranks, Problem(shape, lengths, mask=mask)) <= ROUNDING


@pytest.mark.parametrize("shape", [RING4, ULYSSES4, USP], ids=["ring", "ulysses", "usp"])
@pytest.mark.parametrize("lengths", [(34, 34, 33, 0), (0, 50, 0, 47), (0, 0, 0, 3), (1, 1, 1, 0), (5, 90, 1, 3)])
@pytest.mark.parametrize("mask", ["", "blind"])
def test_any_division_even_without_tokens(gloo_ranks, shape, lengths, mask):
    assert largest(gloo_ranks, Problem(shape, lengths, mask=mask)) <= ROUNDING


@pytest.mark.parametrize("shape", [RING2, ULYSSES2], ids=["ring", "ulysses"])
@pytest.mark.parametrize("lengths", [(0, 7), (7, 0), (0, 0)])
def test_one_of_two_ranks_without_tokens(gloo_ranks, shape, lengths):
    assert largest(gloo_ranks, Problem(shape, lengths)) <= ROUNDING


@pytest.mark.parametrize("shape", [RING4, ULYSSES4, USP], ids=["ring", "ulysses", "usp"])
@pytest.mark.parametrize("key_lengths", [(7, 6, 6, 6), (0, 9, 0, 4)])
def test_cross_attention_of_two_divided_sequences(gloo_ranks, shape, key_lengths):
    problem = Problem(shape, (26, 25, 25, 25), key_lengths, mask="additive")
    assert largest(gloo_ranks, problem) <= ROUNDING


@pytest.mark.parametrize("shape", [RING4, ULYSSES4, USP], ids=["ring", "ulysses", "usp"])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
def test_grouped_query_attention_with_scale(gloo_ranks, shape, key_heads):
    problem = Problem(shape, (26, 25, 25, 25), heads=8, key_heads=key_heads, scale=0.3, mask="heads")
    assert largest(gloo_ranks, problem) <= ROUNDING


@pytest.mark.parametrize("shape", [RING2, ULYSSES2], ids=["ring", "ulysses"])
@pytest.mark.parametrize("attention", ["flash", "xformers"])
def test_backend_that_gives_a_log_sum_exp(gloo_ranks, shape, attention):
    assert largest(gloo_ranks, Problem(shape, (49, 48), attention=attention, mask="keys")) <= ROUNDING


def test_float64_shows_the_algorithm_itself(gloo_ranks):
    problem = Problem(USP, (26, 25, 25, 25), mask="additive", dtype=torch.float64)
    assert largest(gloo_ranks, problem) <= 1e-14


@pytest.mark.parametrize("shape", [RING4, ULYSSES4, USP], ids=["ring", "ulysses", "usp"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_short_dtypes_err_no_more_than_twice_as_much_as_sdpa(gloo_ranks, shape, dtype):
    problem = Problem(shape, (130, 130, 129, 129), dim=64, mask="keys", dtype=dtype)
    results = run(gloo_ranks, "cases.errors", problem)
    ours, plain = (max(result[index] for result in results) for index in (1, 2))
    assert plain > 0 and ours <= 2 * plain


@pytest.mark.parametrize("shape", [ULYSSES2, ULYSSES4], ids=["2", "4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_ulysses_is_bit_equal_to_sdpa(gloo_ranks, shape, dtype):
    lengths = (49, 48) if shape == ULYSSES2 else (26, 25, 25, 25)
    assert all(run(gloo_ranks, "cases.is_bit_equal", Problem(shape, lengths, mask="additive", dtype=dtype)))


def test_ulysses_takes_any_attention_function(gloo_ranks):
    shapes = run(gloo_ranks, "cases.with_function", Problem(ULYSSES2, (5, 4), mask="heads"))
    assert shapes == [[(2, 2, 9, 16)] * 3 + [(2, 2, 9, 9)]] * 2


@pytest.mark.parametrize(("key_heads", "on_a_rank"), [(1, 1), (2, 1), (4, 1), (8, 2)])
def test_key_heads_are_repeated_no_further_than_needed(gloo_ranks, key_heads, on_a_rank):
    problem = Problem(ULYSSES4, (5, 4, 4, 4), heads=8, key_heads=key_heads, mask="keys")
    shapes = [(2, 2, 17, 16), *[(2, on_a_rank, 17, 16)] * 2, (2, 1, 1, 17)]
    assert run(gloo_ranks, "cases.with_function", problem) == [shapes] * 4


def test_next_block_travels_while_this_one_is_attended_to(gloo_ranks):
    events = ["send", "attend", "wait"]
    assert gloo_ranks(4).run("attention.counts.num_overlapped") == [[*events * 3, "attend"]] * 4


def test_error_in_a_ring_waits_for_what_is_on_its_way_but_not_for_ever(gloo_ranks):
    (said, taken, right), other = gloo_ranks(2).run("attention.mesh_groups.ring_with_late_rank", patience=0.3)
    assert said == "rank 0 is out of memory" and 0.3 <= taken < 5 and right
    assert other[0] == "rank 1 is out of memory" and other[2]


def test_error_between_portions_of_heads_leaves_no_trace(gloo_ranks):
    assert gloo_ranks(2).run("attention.mesh_groups.portions_with_error") == [True, True]


@pytest.mark.parametrize(("num_tokens", "expected"), [(1088, 1), (4608, 2), (16384, 7)])
def test_cpu_keeps_portions_below_what_is_mapped_anew(num_tokens, expected):
    q = torch.empty(1, 24, 3, 128, dtype=torch.bfloat16, device="meta")
    axis = Axis(0, (0, 1))
    call = _Call(RankMesh(ulysses=axis, sequence=axis), (), (), None, None, "pytorch")
    # The same on every rank, whatever its own share of the tokens.
    assert call.max_portions(q, q, (num_tokens - 3, 3)) == expected


ONE, TWO = ["send", "wait", "attend", "send"], ["send", "send", *["wait", "attend", "send"] * 2]


@pytest.mark.parametrize(
    ("heads", "key_heads", "max_portions", "expected"),
    [(8, 8, 2, TWO), (8, 4, 2, TWO), (8, 2, 2, ONE), (6, 6, 2, ONE), (8, 8, 3, TWO)],
)
def test_portions_of_heads_travel_while_another_is_attended_to(gloo_ranks, heads, key_heads, max_portions, expected):
    problem = Problem(ULYSSES2, (5, 4), mask="heads", heads=heads, key_heads=key_heads)
    results = gloo_ranks(2).run("attention.counts.in_portions", problem=problem, max_portions=max_portions)
    assert results == [(True, expected)] * 2


@pytest.mark.parametrize(
    ("problem", "expected"),
    [
        (Problem(ULYSSES4, (7, 6, 6, 6)), [(2, 0)] * 4),
        (Problem(ULYSSES4, (7, 6, 6, 6), (2, 1, 1, 1)), [(3, 0)] * 4),
        (Problem(RING4, (7, 6, 6, 6)), [(0, 6)] * 4),  # three times one to the next and one from the last
        (Problem(USP, (7, 6, 6, 6)), [(2, 2)] * 4),
        (Problem(RING2, (0, 7)), [(0, 1)] * 2),  # no message about nothing
    ],
)
def test_one_message_carries_all_of_q_k_and_v(gloo_ranks, problem, expected):
    assert run(gloo_ranks, "counts.num_messages", problem) == expected


@pytest.mark.parametrize("shape", [RING2, ULYSSES2], ids=["ring", "ulysses"])
def test_compiled_blocks_break_once(gloo_ranks, shape):
    assert gloo_ranks(2).run("attention.counts.num_graphs", shape=shape) == [2, 2]


@pytest.mark.parametrize(
    ("shape", "attention", "heads", "message"),
    [
        (RING2, "sage", 2, 'attention "sage" returns no log-sum-exp.*allowed are pytorch, flash, xformers'),
        (ULYSSES2, "sub_quad", 2, 'attention "sub_quad" returns no log-sum-exp'),
        (ULYSSES2, "pytorch", 3, "3 heads do not divide among 2 ranks of Ulysses.*choose_mesh"),
    ],
)
def test_refused_on_every_rank(gloo_ranks, shape, attention, heads, message):
    texts = gloo_ranks(2).run("attention.cases.refusal", shape=shape, attention=attention, heads=heads)
    assert len(texts) == 2 and all(re.search(message, text) for text in texts)
