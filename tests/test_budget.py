"""A run lands on its target speedup, whatever its reused calls cost."""

import math

import pytest

from para_core.budget import Budget

NUM_BLOCKS, NUM_STEPS = 10, 30


@pytest.mark.parametrize("target", [1.3, 2.0, 3.0, 5.0])
@pytest.mark.parametrize("foreseen", [0.0, 0.5, 1.0], ids=lambda share: f"{share:.0%} foreseen")
def test_target_is_met_within_a_tenth_in_blocks(target, foreseen):
    budget, gap, spent = Budget(target, NUM_BLOCKS), 0, 0
    for step in range(NUM_STEPS):
        gap += 1
        estimate = 0.01 * gap**1.5 * (2 + math.sin(step)) if step else None
        if estimate is not None and estimate < foreseen * budget.limit(step, NUM_STEPS):
            budget.note(reused=True, num_blocks=0)
            continue
        reused = budget.allows_reuse(estimate, step, NUM_STEPS)
        budget.note(reused=reused)
        spent += 1 if reused else NUM_BLOCKS
        gap = gap if reused else 0
    assert NUM_STEPS * NUM_BLOCKS / spent == pytest.approx(target, rel=0.1)


def test_nothing_is_foreseen_before_something_was_measured():
    assert Budget(2.0, NUM_BLOCKS).limit(0, NUM_STEPS) == 0
