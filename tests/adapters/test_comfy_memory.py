"""What the cache holds for a run: at most what it says, and nothing once the run has ended, however it ended."""

import gc
import math
import weakref
from unittest import mock

import pytest
from tiny_models import ALWAYS, TINY_MODELS, build, fbcache, sample

pytestmark = pytest.mark.usefixtures("comfy")

DECISIONS = pytest.mark.parametrize("decision", ["first_block", "prediction"])
ITEM_SIZE = 4  # float32
# Tokens and width of each cached stream, as the model's first block sees them.
STREAMS = {
    "flux": [(5 * 7, 256)],
    "sd15": [(9 * 13, 32)],
    "ltxav": [(3 * 3 * 5, 64), (9, 32)],
    "wan": [(3 * 3 * 5, 256)],
}


class Held:
    """Weak references to each run's cache, and to every tensor that it keeps."""

    def __init__(self) -> None:
        self.caches, self.tensors = [], []

    def alive(self):
        gc.collect()
        return [found() for found in (*self.caches, *self.tensors) if found() is not None]


@pytest.fixture
def held():
    from para_core.adapters import comfy_fbcache
    from para_core.kept_residual import KeptResidual

    held, remember = Held(), KeptResidual.__init__

    def run(*args, **kwargs):
        cache = comfy_fbcache_run(*args, **kwargs)
        held.caches.append(weakref.ref(cache))
        return cache

    def kept(self, *args, **kwargs):
        remember(self, *args, **kwargs)
        held.tensors.append(weakref.ref(self.held))

    comfy_fbcache_run = comfy_fbcache.CacheRun
    with mock.patch.object(comfy_fbcache, "CacheRun", run), mock.patch.object(KeptResidual, "__init__", kept):
        yield held


@pytest.mark.parametrize("name", ["flux", "wan", "ltxav", "lumina2", "hidream", "sd15"])
@DECISIONS
def test_everything_is_freed_when_a_run_ends(held, name, decision):
    tiny = TINY_MODELS[name]
    cached = fbcache(build(tiny), ALWAYS, decision=decision, order=2)
    sample(cached, tiny, steps=4, cfg=4.0)
    assert len(held.caches) == 1 and held.tensors
    assert held.alive() == []


@pytest.mark.parametrize("name", ["flux", "wan", "ltxav", "lumina2", "hidream", "sd15"])
@DECISIONS
def test_everything_is_freed_when_a_run_is_cancelled(held, name, decision):
    import comfy.model_management

    def cancel(report):
        if report.num_calls == 4 and not report.finished:
            assert held.alive()
            raise comfy.model_management.InterruptProcessingException

    tiny = TINY_MODELS[name]
    cached = fbcache(build(tiny), ALWAYS, cancel, decision=decision, order=2)
    with mock.patch("para_core.adapters.comfy_cache_run.TELL_INTERVAL", 0.0):
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(cached, tiny, steps=8, cfg=4.0, num_tokens=(9, 5))
    assert held.alive() == []


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("order", [0, 1, 2])
@DECISIONS
def test_at_most_two_residuals_are_held_for_each_conditioning_and_order(name, order, decision):
    reports, tiny = [], TINY_MODELS[name]
    cached = fbcache(build(tiny), ALWAYS, reports.append, decision=decision, order=order, max_consecutive_hits=1)
    sample(cached, tiny, steps=8, cfg=4.0, num_tokens=(9, 5))
    assert reports[-1].num_reused_calls > 0
    one = ITEM_SIZE * sum(math.prod(shape) for shape in STREAMS[name])
    num_conditionings = len(reports[-1].conditionings)
    assert num_conditionings == 2
    assert 2 * one * num_conditionings <= reports[-1].num_bytes <= 2 * (order + 1) * one * num_conditionings
