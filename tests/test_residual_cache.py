"""When the residual of the skipped blocks may be reused, and what it is."""

import pytest
import torch

from para_core.residual_cache import CacheConfig, ResidualCache


def test_diff_is_the_relative_l1_distance_to_the_last_computed_step():
    cache = ResidualCache()
    first, rest = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    assert cache.diff(first) is None
    cache.remember(first, rest)
    later = first + 0.25
    expected = 0.25 / first.abs().mean()
    torch.testing.assert_close(cache.diff(later), expected)
    cache.reuse()
    torch.testing.assert_close(cache.diff(later), expected, msg="a reused step must not move the comparison")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_diff_of_half_types_is_accumulated_in_float32(dtype):
    cache = ResidualCache()
    first = torch.full((1, 4096, 64), 3.0, dtype=dtype)
    cache.remember(first, first)
    assert cache.diff(first + 0.5).item() == pytest.approx(0.5 / 3, rel=1e-5)


@pytest.mark.parametrize(
    "other", [torch.ones(1, 6, 3), torch.ones(1, 5, 3, dtype=torch.bfloat16)], ids=["size", "dtype"]
)
def test_another_size_or_dtype_is_not_compared(other):
    cache = ResidualCache()
    cache.remember(torch.ones(1, 5, 3), torch.ones(1, 5, 3))
    assert cache.diff(other) is None


def test_limit_of_consecutive_hits():
    cache = ResidualCache()
    assert not cache.allows_hit(0), "nothing is remembered yet"
    cache.remember(torch.ones(1), torch.ones(1))
    for _ in range(2):
        assert cache.allows_hit(2) and cache.allows_hit(0)
        cache.reuse()
    assert not cache.allows_hit(2) and cache.allows_hit(0)
    cache.remember(torch.ones(1), torch.ones(1))
    assert cache.allows_hit(2)


def test_bytes_are_those_of_both_residuals():
    cache = ResidualCache()
    assert cache.num_bytes == 0
    cache.remember(torch.ones(2, 3), torch.ones(2, 3))
    assert cache.num_bytes == 2 * 6 * 4
    cache.remember(torch.ones(2, 3), None)
    assert cache.num_bytes == 6 * 4


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
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        CacheConfig(**settings)
