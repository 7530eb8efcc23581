"""What residuals take of the device's memory, and how they are kept outside of it."""

import pytest
import torch
from residual_kinds import BOTH, estimate

from para_core import kept_residual
from para_core.predicted_cache import PredictedCache
from para_core.residual_cache import CacheConfig


@BOTH
def test_bytes_are_those_of_both_residuals(kind):
    cache = kind(CacheConfig())
    assert cache.num_bytes == 0
    cache.remember(torch.ones(2, 3), torch.ones(2, 3), 1.0, 0.1)
    assert cache.num_bytes == 2 * 6 * 4
    cache.remember(torch.ones(2, 3), None, 0.9, 0.1)
    assert cache.num_bytes == 6 * 4


def test_large_residuals_are_compared_by_a_sample():
    cache = PredictedCache(CacheConfig())
    first = torch.randn(1, 3000, 1024)
    cache.remember(first, first.clone(), 1.0, 0.1)
    assert cache.num_bytes == 2 * 4 * first.numel(), "samples are views of what is kept anyway"
    assert cache._first_samples[0].numel() == cache._rest_samples[0].numel() <= PredictedCache.SAMPLE
    assert estimate(cache, 1.1 * first, 0.9) == pytest.approx(0.1 / 1.1, rel=1e-3)


def test_residuals_that_are_not_contiguous_take_no_more_memory():
    cache = PredictedCache(CacheConfig(order=1))
    for at in (1.0, 0.9):
        cache.remember(*(torch.randn(1, 6, 5).transpose(1, 2) for _ in range(2)), at, 0.1)
    assert cache.num_bytes == 4 * 30 * 4


def test_the_sample_visits_all_channels():
    """1024 x 3072, FLUX at 512 x 512: every third value would be of every third channel."""
    cache, first = PredictedCache(CacheConfig()), torch.zeros(1, 1024, 3072)
    first[..., 0::3] = 1.0
    cache.remember(first, first.clone(), 1.0, 0.1)
    changed = first.clone()
    changed[..., 1::3] = 1.0
    assert estimate(cache, changed, 0.9) == pytest.approx(0.5**0.5, rel=0.02)


def test_beside_residuals_in_cpu_memory_little_stays_on_the_device():
    cache = PredictedCache(CacheConfig(residual_device="cpu", order=1))
    for at in (1.0, 0.9):
        cache.remember(torch.randn(1, 512, 1000), torch.randn(1, 512, 1000), at, 0.1)
    whole = 4 * 4 * 512 * 1000
    assert whole < cache.num_bytes < 1.2 * whole


def continued(kind, residual_device, device="cpu"):
    """(results of three reused steps and a computed one behind them, the cache)."""
    cache = kind(CacheConfig(order=2, residual_device=residual_device))
    generator, results = torch.Generator().manual_seed(0), []
    for at in (1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
        first, rest = (torch.randn(1, 5, 3, generator=generator).to(device) for _ in range(2))
        estimate(cache, first, at)
        results.append(cache.reuse(at, 0.1) if 0.5 < at < 0.75 else cache.remember(first, rest, at, 0.1))
    return [result for result in results if result is not None], cache


@BOTH
def test_residuals_in_cpu_memory_are_copied_there_and_fetched_for_use(kind, monkeypatch):
    """A CPU has no other memory to copy from, so the copies are made to show here."""
    expected, _ = continued(kind, "model")
    away, home = [], []
    monkeypatch.setattr(kept_residual, "to_host", lambda residual: away.append(residual) or -residual)
    monkeypatch.setattr(kept_residual, "to_device", lambda held, device: home.append(device) or -held)
    found, _ = continued(kind, "cpu")
    assert len(away) >= 8, "both of each computed step"
    assert home and set(home) == {torch.device("cpu")}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.gpu
@BOTH
def test_residuals_of_a_gpu_are_kept_in_cpu_memory(kind):
    expected, _ = continued(kind, "model", "cuda")
    found, cache = continued(kind, "cpu", "cuda")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert {residual.held.device.type for residual in cache._rests} == {"cpu"}
    assert {result.device.type for result in found} == {"cuda"}
