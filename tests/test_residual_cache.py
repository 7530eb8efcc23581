"""When the residual of the skipped blocks may be reused, and what it is."""

import pytest
import torch
from residual_kinds import BOTH, estimate

from para_core.extrapolation import newton_weights
from para_core.predicted_cache import PredictedCache
from para_core.residual_cache import CacheConfig, ResidualCache


def test_plain_estimate_is_the_relative_l1_distance_to_the_last_computed_step():
    cache = ResidualCache(CacheConfig())
    first, rest = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert estimate(cache, first) is None
    cache.remember(first, rest, 1.0, 0.1)
    later = first + 0.25
    expected = float(0.25 / first.abs().mean())
    assert estimate(cache, later) == pytest.approx(expected, rel=1e-6)
    cache.reuse(0.9, 0.1)
    assert estimate(cache, later) == pytest.approx(expected, rel=1e-6), "a reused step must not move the comparison"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_estimate_of_half_types_is_accumulated_in_float32(dtype):
    cache = ResidualCache(CacheConfig())
    first = torch.full((1, 4096, 64), 3.0, dtype=dtype)
    cache.remember(first, first, 1.0, 0.1)
    assert estimate(cache, first + 0.5) == pytest.approx(0.5 / 3, rel=1e-5)


@BOTH
@pytest.mark.parametrize(
    "other", [torch.ones(1, 6, 3), torch.ones(1, 5, 3, dtype=torch.bfloat16)], ids=["size", "dtype"]
)
def test_another_size_or_dtype_is_not_compared(kind, other):
    cache = kind(CacheConfig())
    cache.remember(torch.ones(1, 5, 3), torch.ones(1, 5, 3), 1.0, 0.1)
    assert cache.measure(other) is None


@BOTH
def test_limit_of_consecutive_hits(kind):
    cache = kind(CacheConfig())
    assert not cache.allows_hit(0), "nothing is remembered yet"
    first = torch.ones(1, 2, 2)
    cache.remember(first, first, 1.0, 0.1)
    for at in (0.9, 0.8):
        assert cache.allows_hit(2) and cache.allows_hit(0)
        estimate(cache, first, at)
        cache.reuse(at, 0.1)
    assert not cache.allows_hit(2) and cache.allows_hit(0)
    cache.remember(first, first, 0.7, 0.1)
    assert cache.allows_hit(2)


@BOTH
@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_residual_that_is_a_polynomial_of_its_order_is_continued_exactly(kind, order):
    """Uneven steps; first and rest share their law in time, as they nearly do in a model."""
    torch.manual_seed(0)
    factors = [torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(order + 1)]
    both = [torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(order + 1)]

    def law(parts, at):
        return sum(part * at**power for power, part in enumerate(parts))

    cache = kind(CacheConfig(order=order))
    for at in (1.0, 0.88, 0.8)[: order + 1]:
        estimate(cache, law(factors, at), at)
        cache.remember(law(factors, at), law(both, at), at, 0.1)
    guess = estimate(cache, law(factors, 0.74), 0.74)
    torch.testing.assert_close(cache.reuse(0.74, 0.1), law(both, 0.74), rtol=1e-5, atol=1e-5)
    if kind is PredictedCache:
        assert guess < 1e-2, "a prediction that is right must be seen as right"


@pytest.mark.parametrize("order", [0, 1, 2])
def test_prediction_keeps_two_residuals_for_each_order(order):
    cache = PredictedCache(CacheConfig(order=order))
    for at in (1.0, 0.9, 0.8, 0.7):
        value = torch.randn(2, 3)
        estimate(cache, value, at)
        cache.remember(value, value.clone(), at, 0.1)
    assert cache.num_bytes == 2 * (order + 1) * 6 * 4


@pytest.mark.parametrize("order", [0, 1, 2])
def test_unmeasured_reuse_continues_the_residual_of_all_blocks(order):
    torch.manual_seed(0)
    parts = [[torch.randn(2, 5, 3, dtype=torch.float64) for _ in range(order + 1)] for _ in range(2)]

    def laws(at):
        return [sum(part * at**power for power, part in enumerate(of_one)) for of_one in parts]

    cache = PredictedCache(CacheConfig(order=order))
    for at in (1.0, 0.88, 0.8)[: order + 1]:
        first, rest = laws(at)
        estimate(cache, first, at)
        cache.remember(first, rest, at, 0.1)
    torch.testing.assert_close(cache.reuse_unmeasured(0.74, 0.1), sum(laws(0.74)), rtol=1e-5, atol=1e-5)
    assert not cache.allows_hit(1), "it counts among the hits in a row"


def test_unmeasured_reuse_is_foreseen_from_measured_estimates():
    cache = PredictedCache(CacheConfig(order=0))
    base = torch.ones(1, 50, 30)
    cache.remember(base, base, 1.0, 0.1)
    assert cache.foresee(0.9) is None, "nothing was measured yet"
    measured = estimate(cache, 1.01 * base, 0.9)
    assert cache.foresee(0.85) == pytest.approx(1.5 * measured)
    cache.remember(1.01 * base, base, 0.9, 0.1)
    assert cache.foresee(0.8) == pytest.approx(measured) and cache.foresee(0.9) is None
    assert ResidualCache(CacheConfig()).foresee(0.9) is None, "the published cache always measures"


def test_kept_residuals_fit_only_tokens_of_their_kind():
    cache = PredictedCache(CacheConfig())
    tokens = torch.ones(1, 5, 3)
    assert not cache.fits(tokens)
    cache.remember(tokens, tokens, 1.0, 0.1)
    assert cache.fits(tokens) and not cache.fits(torch.ones(1, 6, 3)) and not cache.fits(tokens.bfloat16())
    cache.remember(tokens, None, 0.9, 0.1)
    assert not cache.fits(tokens)


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_order_2_follows_the_parabola_only_as_far_as_it_has_foreseen_the_run(noise):
    cache, generator = PredictedCache(CacheConfig(order=2)), torch.Generator().manual_seed(0)
    bend, first = torch.randn(2, 1, 50, 30, generator=generator), torch.ones(1, 50, 30)
    times, rests = [], []
    for at in (1.0, 0.93, 0.85, 0.8, 0.71, 0.66, 0.6, 0.52):
        estimate(cache, first, at)  # the first block has nothing to say: it never changes
        rest = at * bend[0] + at**2 * bend[1] + noise * torch.randn(1, 50, 30, generator=generator)
        cache.remember(first, rest, at, 0.1)
        times, rests = [at, *times][:3], [rest, *rests][:3]
    estimate(cache, first, 0.45)
    found = cache.reuse(0.45, 0.1)
    line, parabola = (
        sum(w * rest for w, rest in zip(newton_weights(times, 0.45, order), rests, strict=True)) for order in (1, 2)
    )
    share = float(((found - line) * (parabola - line)).sum() / (parabola - line).square().sum())
    assert share == pytest.approx(1.0, abs=1e-3) if not noise else share < 0.3


@BOTH
def test_a_time_that_is_evaluated_twice_counts_once(kind):
    cache = kind(CacheConfig(order=1))
    one, two = torch.randn(1, 5, 3), torch.randn(1, 5, 3)
    for value, at in ((one, 1.0), (two, 0.9), (one, 0.9)):
        estimate(cache, value, at)
        cache.remember(value, value, at, 0.1)
    estimate(cache, one, 0.8)
    torch.testing.assert_close(cache.reuse(0.8, 0.1), one)


def test_first_residuals_stay_with_their_times_when_one_is_evaluated_twice():
    """Unmeasured reuse continues first as well; a line through 1, 2 at times 1.0, 0.9 is 3 at 0.8."""
    cache = PredictedCache(CacheConfig(order=1))
    for value, at in ((1.0, 1.0), (5.0, 0.9), (2.0, 0.9)):
        residual = torch.full((1, 5, 3), value)
        estimate(cache, residual, at)
        cache.remember(residual, residual, at, 0.1)
    torch.testing.assert_close(cache.reuse_unmeasured(0.8, 0.1), torch.full((1, 5, 3), 2 * 3.0))


def test_prediction_that_fails_is_seen_as_wrong():
    torch.manual_seed(0)
    cache = PredictedCache(CacheConfig(order=1))
    for at in (1.0, 0.9):
        value = torch.randn(1, 50, 30)
        estimate(cache, value, at)
        cache.remember(value, value, at, 0.1)
    assert estimate(cache, torch.randn(1, 50, 30), 0.8) > 0.5


@BOTH
@pytest.mark.parametrize("value", [torch.inf, torch.nan, 4e4])
def test_figures_that_are_not_finite_reuse_nothing_and_are_forgotten(kind, value):
    cache = kind(CacheConfig(order=1))
    for at in (1.0, 0.9):
        cache.remember(*(torch.randn(1, 5, 3).half() for _ in range(2)), at, 0.1)
    sign = -1 if value == 4e4 else 1
    cache.remember(torch.full((1, 5, 3), sign * value).half(), torch.randn(1, 5, 3).half(), 0.8, 0.1)
    found = cache.estimate(cache.figures(torch.full((1, 5, 3), value).half()).tolist(), 0.7)
    assert found is None or found > 0.5
    later = cache.foresee(0.6)
    assert later is None or later > 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"residual_diff_threshold": -0.5}, r"^residual_diff_threshold is -0.5; allowed is 0 or more. Use 0 to never"),
        ({"residual_diff_threshold": float("nan")}, r"^residual_diff_threshold is nan; allowed"),
        (
            {"start_percent": 0.8, "end_percent": 0.2},
            r"^start_percent 0.8 and end_percent 0.2 do not make a range; allo",
        ),
        ({"end_percent": 1.2}, r"^start_percent 0.0 and end_percent 1.2 do not make a range"),
        ({"warmup_steps": -1}, r"^warmup_steps is -1; allowed are whole numbers from 0"),
        ({"max_consecutive_hits": 1.5}, r"^max_consecutive_hits is 1.5; allowed are whole numbers from 0"),
        ({"order": 3}, r"^order is 3; allowed are 0"),
        ({"residual_device": "disk"}, r'^residual_device is "disk"; allowed are model and cpu'),
        ({"decision": "luck"}, r'^decision is "luck"; allowed are first_block and prediction'),
        ({"target_speedup": 0.5}, r"^target_speedup is 0.5; allowed is 1 or more. Use 0 for a threshold"),
        (
            {"target_speedup": 2.0, "residual_diff_threshold": 0.1},
            r"^target_speedup 2 and residual_diff_threshold 0.1 exc",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**settings)
