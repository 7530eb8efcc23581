"""The cache on the ranks of a group, each with some of the tokens or rows: all decide as one that has them all."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from para_core.block_forward import swapped_forwards
from para_core.cache_run import CacheRun
from para_core.families import BlockStack, ModelFamily, Stream
from para_core.predicted_cache import PredictedCache
from para_core.residual_cache import CacheConfig
from para_core.run_state import Step

NUM_STEPS = 24
FAMILY = ModelFamily("pointwise", ("Pointwise",), (BlockStack("blocks", (Stream("x", None, ("img",)),)),))


class Block(nn.Module):
    def __init__(self, index, growing=False):
        super().__init__()
        self.scale, self.growing = 0.3 + 0.1 * index, growing

    def forward(self, x):
        x = x + self.scale * torch.sin(2 * x)
        return torch.cat((x, x), 1) if self.growing else x


class Pointwise(nn.Module):
    """Tokens know nothing of each other, so that a shard of them can be run alone."""

    def __init__(self, growing=False):
        super().__init__()
        self.blocks = nn.ModuleList([Block(0), Block(1), Block(2), Block(3, growing)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Group:
    """Adds up what the threads that stand for ranks give, and counts how often each of them gave something."""

    def __init__(self, size):
        self.calls = [0] * size
        self._given = [None] * size
        self._barrier = threading.Barrier(size, timeout=5)

    def reduce_of(self, rank):
        def reduce(figures):
            self.calls[rank] += 1
            self._given[rank] = figures
            self._barrier.wait()
            total = sum(self._given[1:], self._given[0])
            self._barrier.wait()
            return total

        return reduce


def sampled(config, x, here=None, **kwargs):
    """(records of the run, the sample): Euler steps of uneven width, over two conditionings in one batch."""
    model, run = Pointwise(), CacheRun(FAMILY, config, **kwargs)
    times = [1 - (step / NUM_STEPS) ** 1.3 for step in range(NUM_STEPS + 1)]
    for step, (at, following) in enumerate(zip(times, times[1:], strict=False)):
        where = Step(step, at, width=at - following, num_steps=NUM_STEPS)
        with (
            run.call(FAMILY, [4], {"a": "positive", "b": "negative"}, where, here=here) as call,
            swapped_forwards(model, FAMILY, call),
        ):
            x = x + 0.3 * (following - at) * model(x + 0.3 * at)
    return list(run.report().conditionings.values()), x


def two_rows(num_pictures=1):
    """Tokens of two conditionings, 7 a picture, the last three louder."""
    tokens = torch.randn(num_pictures, 7, 4, generator=torch.Generator().manual_seed(1))
    tokens[:, 4:] *= 3
    return torch.cat((tokens, tokens.roll(1, -1)))


def on_ranks(config, shards, here=None):
    group, here = Group(len(shards)), here or [None] * len(shards)
    with ThreadPoolExecutor(len(shards)) as threads:
        futures = [
            threads.submit(sampled, config, shard, here[rank], reduce=group.reduce_of(rank))
            for rank, shard in enumerate(shards)
        ]
        return group, [future.result() for future in futures]


def assert_decided_alike(group, results, expected):
    assert {record.reused for record in expected[0]} == {True, False}
    for found, _ in results:
        for ours, theirs in zip(found, expected, strict=True):
            assert [record.reused for record in ours] == [record.reused for record in theirs]
            assert ours[0].diff is theirs[0].diff is None
            assert [one.diff is None for one in ours] == [one.diff is None for one in theirs]
            diffs = [[one.diff for one in records if one.diff is not None] for records in (ours, theirs)]
            assert diffs[0] == pytest.approx(diffs[1], rel=1e-3)
    assert len(set(group.calls)) == 1 and group.calls[0] >= NUM_STEPS - 1


CONFIGS = pytest.mark.parametrize(
    "config",
    [
        CacheConfig(0.06),
        CacheConfig(0.06, order=1, decision="prediction"),
        CacheConfig(0.06, order=2, decision="prediction"),
        CacheConfig(order=1, decision="prediction", target_speedup=1.6),
    ],
    ids=["first_block", "order 1", "order 2", "target_speedup"],
)


@pytest.mark.parametrize("lengths", [(4, 3), (1, 6), (7, 0)], ids=str)
@CONFIGS
def test_ranks_decide_as_one_that_has_all_tokens(config, lengths):
    expected, whole = sampled(config, two_rows())
    if config.decision == "prediction":
        assert any(record.reused and record.diff is None for record in expected[0]), "none is reused unmeasured"
    group, results = on_ranks(config, two_rows().split(lengths, 1))
    assert_decided_alike(group, results, expected)
    torch.testing.assert_close(torch.cat([part for _, part in results], 1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "here",
    [(slice(0, 1), slice(1, 2)), (slice(0, 1), slice(0, 1), slice(1, 2), slice(1, 2))],
    ids=["a conditioning each", "a picture each"],
)
@CONFIGS
def test_ranks_decide_as_one_that_has_all_rows(config, here):
    rows = two_rows(len(here) // 2)
    rows[1::2] *= 2
    expected, whole = sampled(config, rows)
    group, results = on_ranks(config, rows.chunk(len(here)), here)
    assert_decided_alike(group, results, expected)
    torch.testing.assert_close(torch.cat([part for _, part in results]), whole, rtol=1e-4, atol=1e-5)


def test_a_correction_is_bounded_by_the_size_of_all_tokens():
    def correction(first, rest, **kwargs):
        cache = PredictedCache(CacheConfig(), **kwargs)
        cache.remember(first, rest, 1.0, 0.1)
        for at in (0.9, 0.8):
            cache.judge(kwargs.get("reduce", torch.clone)(cache.figures(first)).tolist(), at)
            cache.reuse(at, 0.1)
        return cache.remember(first, 100 * rest**2, 0.7, 0.1)

    first, rest, group = torch.ones(1, 7, 4), torch.arange(28.0).reshape(1, 7, 4), Group(2)
    whole = correction(first, rest)
    with ThreadPoolExecutor(2) as threads:
        parts = threads.map(
            lambda rank: correction(
                first.split((2, 5), 1)[rank], rest.split((2, 5), 1)[rank], reduce=group.reduce_of(rank)
            ),
            range(2),
        )
    torch.testing.assert_close(torch.cat(list(parts), 1), whole)
    assert float(whole.norm() / (100 * rest**2).norm()) == pytest.approx(PredictedCache.MAX_CORRECTION, rel=1e-4)


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_a_rank_that_cannot_compare_makes_all_compute(decision):
    """Its shard alone has changed its size, so only this rank notices; the call would be foreseen."""
    group, config = Group(2), CacheConfig(10.0, decision=decision, order=1)

    def run_rank(rank):
        model, run = Pointwise(), CacheRun(FAMILY, config, reduce=group.reduce_of(rank))
        for step, length in enumerate((4, 4, 4 + rank, 4 + rank, 4 + rank)):
            with (
                run.call(FAMILY, [4], {"a": "a"}, Step(step, 1 - 0.1 * step, width=0.1)) as call,
                swapped_forwards(model, FAMILY, call),
            ):
                model(torch.ones(1, length, 4))
        records = run.report().conditionings["a"]
        return [record.reused for record in records], [record.diff is None for record in records]

    with ThreadPoolExecutor(2) as threads:
        decided = list(threads.map(run_rank, range(2)))
    without_estimate = [True, False, True, False, decision == "prediction"]
    assert decided == [([False, True, False, True, True], without_estimate)] * 2
    assert group.calls[0] == group.calls[1]


def test_blocks_that_change_the_number_of_tokens_are_refused_on_ranks():
    model, run = Pointwise(growing=True), CacheRun(FAMILY, CacheConfig(0.1), reduce=lambda figures: 2 * figures)
    with (
        pytest.raises(ValueError, match=r"^a patch on the blocks turned \(1, 3, 4\) tokens into \(1, 6, 4\); with the"),
        run.call(FAMILY, [4], {"a": "a"}, Step(0, 1.0)) as call,
        swapped_forwards(model, FAMILY, call),
    ):
        model(torch.ones(1, 3, 4))
