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


class Ranks:
    """Two ranks with these seconds; the first case only warms up."""

    def __init__(self):
        self.cases = []

    def run(self, case, *, num_tokens, num_rounds, implementations, **_):
        self.cases.append(num_tokens)
        of_rank = {"one": [(8.0, 9.0), (0.0, 9.0)], "alone": [(8.0, 18.0)] * 2, "ring": [(4.0, 6.0), (5.0, 3.0)]}
        return [{name: [of_rank[name][rank]] * num_rounds for name in implementations} for rank in range(2)]


def test_speedup_is_one_ranks_time_over_the_slowest(monkeypatch):
    ranks = Ranks()
    monkeypatch.setattr(Bench, "group", lambda _, world_size: ranks)
    (ring,) = Bench(1).compare(2, ["ring"], 100, 2)
    assert (ring.cpu, ring.wall) == ((1.6, 1.6), (1.5, 1.5))
    assert (ring.ceiling_cpu, ring.ceiling_wall) == ((2.0, 2.0), (1.0, 1.0))
    assert ring.line().split()[:5] == ["ring", "1.60", "(1.60", "to", "1.60)"]
    assert ranks.cases[-1] == 100


@pytest.mark.parametrize("num_blocks", [0, 1])
def test_every_implementation_is_timed_in_every_round(gloo_ranks, num_blocks):
    names = ("one", "alone", "ring", "ulysses")
    first, second = gloo_ranks(2).run(
        "benchmarks.attention_stack.in_turn",
        implementations=names,
        num_tokens=33,
        num_rounds=2,
        num_blocks=num_blocks,
    )
    assert {name: len(seconds) for name, seconds in first.items()} == dict.fromkeys(names, 2)
    assert all(cpu > 0 for name in names for cpu, _ in first[name])
    assert max(cpu for cpu, _ in second["one"]) < min(cpu for cpu, _ in first["one"]), "rank 1 did not wait"
