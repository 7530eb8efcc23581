"""A sequence divided among ranks."""

from __future__ import annotations

import pytest

from para_core.attention import balanced_lengths, slice_of


@pytest.mark.parametrize(
    ("num_tokens", "expected"), [(97, (49, 48)), (101, (26, 25, 25, 25)), (101, (34, 34, 33)), (1, (1, 0)), (0, (0, 0))]
)
def test_lengths_are_balanced(num_tokens, expected):
    assert balanced_lengths(num_tokens, len(expected)) == expected


def test_places_follow_each_other():
    assert [slice_of((3, 0, 2), rank) for rank in range(3)] == [slice(0, 3), slice(3, 3), slice(3, 5)]


@pytest.mark.parametrize("lengths", [(4, 4), (5, 4), (0, 3)])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gathered_sequence_is_whole_on_every_rank(gloo_ranks, lengths, dim):
    assert gloo_ranks(2).run("attention.cases.gathered", lengths=lengths, dim=dim) == [True, True]
