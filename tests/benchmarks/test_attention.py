"""The attention benchmark: what it times is right, and its speedups are of the slowest rank."""

from __future__ import annotations

import importlib.util

import pytest
from benchmarks.attention import ACCEPTED, OURS, PEERS, Bench


@pytest.mark.parametrize("implementation", [*OURS, *PEERS])
def test_implementation_is_right(gloo_ranks, implementation):
    package = implementation.split()[0]
    if package not in OURS and importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed; it is in the extra benchmark")
    errors = gloo_ranks(2).run("benchmarks.attention_stack.error", implementation=implementation)
    assert 0 <= max(errors) <= ACCEPTED


def test_speedup_is_one_ranks_time_over_the_slowest(monkeypatch):
    seconds = {(1, "alone"): (8.0, 9.0), (2, "alone"): (8.0, 18.0), (2, "ring"): (5.0, 6.0)}
    monkeypatch.setattr(Bench, "slowest", lambda _, world_size, name, num_tokens: seconds[world_size, name])
    (ring,) = Bench(1).compare(2, ["ring"], 100, 2)
    assert (ring.cpu, ring.wall) == ((1.6, 1.6), (1.5, 1.5))
    assert (ring.ceiling_cpu, ring.ceiling_wall) == ((2.0, 2.0), (1.0, 1.0))
    assert ring.line().split()[:5] == ["ring", "1.60", "(1.60", "to", "1.60)"]


def test_slowest_rank_counts(monkeypatch):
    bench = Bench(1)

    class Ranks:
        def run(self, case: str, **_: object) -> list[tuple[float, float]]:
            return [(1.0, 4.0), (3.0, 2.0)]

    monkeypatch.setattr(bench, "group", lambda world_size: Ranks())
    assert bench.slowest(2, "ring", 100) == (3.0, 4.0)
