"""Which tokens a rank holds, and what is cut along with them; no ranks needed."""

import pytest
import torch

from para_core.attention.sharding import Layout, Split


def layouts(*totals, num_ranks):
    """The same streams as each rank sees them, the surplus of one behind that of the one in front."""
    found = []
    for rank in range(num_ranks):
        splits, first = [], 0
        for total in totals:
            splits.append(Split.even(total, num_ranks, rank, first))
            first = (first + total) % num_ranks
        found.append(Layout(tuple(splits)))
    return found


@pytest.mark.parametrize("totals", [(7, 35), (5, 3), (0, 4), (9, 45, 13), (1, 1)])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_every_token_is_on_one_rank_and_none_has_two_more_than_another(totals, num_ranks):
    ranks = layouts(*totals, num_ranks=num_ranks)
    tokens = torch.arange(sum(totals))
    parts = [layout.take(tokens, 0) for layout in ranks]
    assert [len(part) for part in parts] == list(ranks[0].lengths)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert torch.cat(parts).sort().values.equal(tokens)
    # What is gathered in rank order is in the order that rank_major names.
    assert torch.cat(parts).equal(ranks[0].rank_major(tokens.device))


def test_parts_are_taken_along_any_dim():
    layout = layouts(3, 5, num_ranks=2)[1]
    tensor = torch.randn(2, 8, 3)
    assert layout.take(tensor, 1).equal(tensor[:, [2, 5, 6, 7]])
    assert layout.take(tensor.movedim(1, -1), -1).equal(layout.take(tensor, 1).movedim(1, -1))


@pytest.mark.parametrize("num_rows", [1, 3, 4, 12, 5])
def test_rows_stand_for_equally_many_neighbours(num_rows):
    rows = torch.arange(num_rows)
    # ComfyUI's rule (wan/model.py, repeat_e): rounded up where it does not divide, and cut.
    expected = rows.repeat_interleave(-(-12 // num_rows))[:12]
    ranks = layouts(12, num_ranks=3)
    assert torch.cat([layout.take_repeated(rows, 0) for layout in ranks]).equal(expected)


def marks(spans, length):
    """What the spans say of each token; tokens that none is about stay None."""
    found = [None] * length
    for start, end, value in spans:
        found[start:end] = [value] * len(found[start:end])
    return found


@pytest.mark.parametrize("spans", [[(0, 7, "a"), (7, None, "b")], [(0, 12, "a"), (12, 20, "b")], [(4, 6, "a")], []])
def test_spans_are_cut_to_each_rank(spans):
    whole = marks(spans, 20)
    for layout in layouts(5, 15, num_ranks=3):
        local = layout.spans(spans, [False, False])
        assert marks(local, layout.length) == [whole[number] for number in layout.take(torch.arange(20), 0)]
        assert all(0 <= start < end <= layout.length for start, end, _ in local)


def test_spans_behind_a_stream_that_is_counted_here():
    """The host has moved the image's spans behind this rank's text."""
    whole = marks([(0, 9, "image"), (9, 15, "reference")], 15)
    for layout in layouts(5, 15, num_ranks=2):
        text, image = layout.splits
        local = layout.spans(
            [(0, 9 + text.length, "image"), (9 + text.length, 15 + text.length, "reference")], [True, False]
        )
        expected = ["image"] * text.length + [whole[number] for number in image_tokens(image)]
        assert marks(local, layout.length) == expected


def image_tokens(split):
    return range(split.start, split.start + split.length)


def test_boundary_is_at_an_end_where_it_is_elsewhere():
    assert [Split((4, 3, 3), rank).local(6) for rank in range(3)] == [4, 2, 0]


@pytest.mark.parametrize("count", [0, 3, 4, 6, 10])
def test_padding_is_cropped_where_it_is(count):
    assert sum(Split((4, 3, 3), 0).cropped(count).lengths) == count
    assert Split((4, 3, 3), 0).cropped(6).lengths == (4, 2, 0)
