"""Prediction and runs behind one another, on every model that the cache serves, in the real ComfyUI."""

from unittest import mock

import pytest
import torch
from tiny_models import ALWAYS, NEVER, TINY_MODELS, build, conditioning, fbcache, relative, sample, with_sampler

pytestmark = pytest.mark.usefixtures("comfy")

MODELS = pytest.mark.parametrize("tiny", TINY_MODELS.values(), ids=TINY_MODELS)


def predicting(model, threshold, listener=None, order=1, **config):
    return fbcache(model, threshold, listener, decision="prediction", order=order, **config)


@MODELS
def test_a_sampler_that_calls_twice_a_step(tiny):
    model, reports = build(tiny), []
    settings = {"sampler": "heun", "steps": 3, "cfg": 4.0, "num_tokens": (9, 5)}
    expected = sample(model, tiny, **settings)
    assert torch.equal(sample(predicting(model, NEVER), tiny, **settings), expected)
    cached = predicting(model, ALWAYS, reports.append)
    first = sample(cached, tiny, **settings)
    assert relative(first, expected) > 1e-4, "reuse changes nothing, so this test shows nothing"
    assert torch.equal(sample(cached, tiny, **settings), first)
    records = reports[-1].conditionings
    assert {name: len(found) for name, found in records.items()} == {"positive": 5, "negative": 5}
    assert all(not found[0].reused and any(record.reused for record in found) for found in records.values())


@MODELS
@pytest.mark.parametrize("order", [1, 2])
def test_hit_at_the_time_of_a_computed_step_reproduces_it_whatever_the_order(tiny, order):
    """Measured, then without block 0; the steps in front of it, which the polynomial goes through too, do not count."""
    outputs, reports = [], []

    def calls(model, x, sigmas):
        for sigma in (sigmas[0], sigmas[1], sigmas[2], sigmas[2]):
            outputs.append(model(x, sigma).clone())
        with mock.patch("para_core.forecast.Forecast.at", lambda *_: 0.0):
            outputs.append(model(x, sigmas[2]).clone())

    with_sampler(predicting(build(tiny), 1e-9, reports.append, order), tiny, calls, cfg=4.0, num_tokens=(9, 5))
    assert set(reports[-1].conditionings) == {"positive", "negative"}
    for records in reports[-1].conditionings.values():
        assert [record.reused for record in records] == [False, False, False, True, True]
        assert [record.diff is None for record in records] == [True, False, False, False, True]
    *_, before, expected, measured, foreseen = outputs
    assert relative(before, expected, tiny) > 1e-3
    assert relative(measured, expected, tiny) <= 1e-5
    assert relative(foreseen, expected, tiny) <= 1e-5


@MODELS
def test_a_run_leaves_nothing_to_the_next(tiny):
    """cfg 1, then cfg 4 with another seed, prompt and batch as in a fresh build; the first again behind a cancelled
    one."""
    used, fresh = (predicting(build(tiny), ALWAYS, max_consecutive_hits=2) for _ in range(2))
    changed = {"cfg": 4.0, "seed": 3, "batch": 2, "positive": conditioning(tiny, 5, 8)}
    first = sample(used, tiny, steps=5)
    assert torch.equal(sample(used, tiny, steps=5, **changed), sample(fresh, tiny, steps=5, **changed))
    cancelled_in_the_middle(used, tiny)
    assert torch.equal(sample(used, tiny, steps=5), first)


def cancelled_in_the_middle(cached, tiny):
    """A run that is interrupted inside the last block, where one of the later steps computes it."""
    import comfy.model_management

    from para_core.families import family_of

    def interrupt(*_):
        if len(calls) >= 3:
            raise comfy.model_management.InterruptProcessingException

    model, calls = cached.model.diffusion_model, []
    block = [block for stack in family_of(model).stacks for block in stack.blocks_in(model)][-1]
    handles = [module.register_forward_pre_hook(interrupt) for module in [*block.modules()][1:]]
    handles.append(model.register_forward_pre_hook(lambda *_: calls.append(1)))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(cached, tiny, steps=8, seed=4)
    for handle in handles:
        handle.remove()
    assert "forward" not in vars(block)


@MODELS
def test_target_speedup_is_met_within_a_tenth(tiny):
    reports = []
    sample(predicting(build(tiny), None, reports.append, target_speedup=2.0), tiny, steps=28)
    report = reports[-1]
    assert report.num_block_calls_baseline / report.num_block_calls == pytest.approx(2.0, rel=0.1)
