"""What a computed step makes up for of the reused ones before it."""

import torch
from residual_kinds import estimate

from para_core.predicted_cache import PredictedCache
from para_core.residual_cache import CacheConfig


def test_computed_step_makes_up_for_half_of_what_the_reused_one_lacked():
    cache = PredictedCache(CacheConfig(order=0))
    base = torch.ones(1, 5, 3)
    cache.remember(base, 10 * base, 1.0, 0.1)
    estimate(cache, 1.01 * base, 0.9)
    torch.testing.assert_close(cache.reuse(0.9, 0.1), 10 * base)
    estimate(cache, 1.02 * base, 0.8)
    # The rest has gone from 10 to 11: halfway it should have been 10.5, and was 10.
    torch.testing.assert_close(cache.remember(1.02 * base, 11 * base, 0.8, 0.1), 0.25 * base)
    estimate(cache, 1.03 * base, 0.7)
    assert cache.remember(1.03 * base, 11 * base, 0.7, 0.1) is None, "nothing was reused in between"


def test_correction_makes_up_for_block_0_where_it_did_not_run():
    cache = PredictedCache(CacheConfig(order=0))
    base = torch.ones(1, 5, 3)
    cache.remember(base, 10 * base, 1.0, 0.1)
    cache.reuse_unmeasured(0.9, 0.1)
    estimate(cache, 1.2 * base, 0.8)
    # Halfway rest should have been 10.5, and first 1.1.
    torch.testing.assert_close(cache.remember(1.2 * base, 11 * base, 0.8, 0.1), (0.25 + 0.05) * base)


def test_correction_is_bounded_and_survives_a_residual_of_zeros():
    cache = PredictedCache(CacheConfig(order=0))
    base = torch.ones(1, 5, 3)
    cache.remember(base, base, 1.0, 0.1)
    for at in (0.9, 0.8, 0.7):
        estimate(cache, base, at)
        cache.reuse(at, 0.1)
    estimate(cache, base, 0.6)
    correction = cache.remember(base, 100 * base, 0.6, 0.1)
    assert correction.norm() <= 1.01 * PredictedCache.MAX_CORRECTION * (100 * base).norm()
    estimate(cache, base, 0.5)
    cache.reuse(0.5, 0.1)
    estimate(cache, base, 0.4)
    assert cache.remember(base, 0 * base, 0.4, 0.1).isfinite().all()
