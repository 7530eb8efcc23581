"""A run lands on its target speedup, whatever its reused calls cost."""

import math

import pytest

from para_core.budget import Budget

NUM_BLOCKS, NUM_STEPS = 10, 30


@pytest.mark.parametrize("target", [1.3, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("foreseen", [0.0, 0.5, 1.0], ids=lambda share: f"{share:.0%} foreseen")
@pytest.mark.parametrize("num_steps", [20, 30, 50])
@pytest.mark.parametrize("trend", [0.85, 1.0, 1.15])
@pytest.mark.parametrize("num_blocks", [NUM_BLOCKS, 57])
def test_target_is_met_within_a_tenth_in_blocks(target, foreseen, num_steps, trend, num_blocks):
    """trend: by which the errors shrink or grow from step to step."""
    budget, gap, spent = Budget(target, num_blocks), 0, 0
    for step in range(num_steps):
        gap += 1
        estimate = 0.01 * gap**1.5 * (2 + math.sin(step)) * trend**step if step else None
        room = budget.has_room_to_measure(step, num_steps)
        if estimate is not None and not room and estimate < foreseen * budget.limit(step, num_steps):
            budget.note(reused=True, num_blocks=0)
            continue
        reused = budget.allows_reuse(estimate, step, num_steps)
        budget.note(reused=reused)
        spent += 1 if reused else num_blocks
        gap = gap if reused else 0
    assert num_steps * num_blocks / spent == pytest.approx(target, rel=0.1)


@pytest.mark.parametrize(("target", "num_first"), [(1.5, 3), (4.0, 1)])
def test_where_the_budget_is_ample_the_first_calls_are_computed(target, num_first):
    budget, computed = Budget(target, NUM_BLOCKS), []
    for step in range(6):
        reused = budget.allows_reuse(0.01 if step else None, step, NUM_STEPS)
        budget.note(reused=reused)
        computed += [] if reused else [step]
    assert computed[:num_first] == list(range(num_first)) and len(computed) == num_first


def test_nothing_is_foreseen_before_something_was_measured():
    assert Budget(2.0, NUM_BLOCKS).limit(0, NUM_STEPS) == 0
