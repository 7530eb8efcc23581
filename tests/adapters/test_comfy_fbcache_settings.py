"""Settings of the FBCache Patcher in the real ComfyUI, what it refuses and what a run tells."""

import logging

import pytest
import torch
from tiny_models import (
    ALWAYS,
    FLUX,
    build,
    fbcache,
    sample,
    with_sampler,
)

pytestmark = pytest.mark.usefixtures("comfy")


def test_unknown_model_is_refused_by_name_before_sampling():
    from para_core.adapters.comfy_fbcache import apply_fbcache
    from para_core.residual_cache import CacheConfig

    model = build(FLUX)
    other = model.clone()
    other.model = type("Other", (), {"diffusion_model": torch.nn.Linear(2, 2)})()
    with pytest.raises(ValueError, match="^Linear is not a model that Para Accelerate knows; supported are: .*FLUX.1"):
        apply_fbcache(other, CacheConfig())


def test_settings_act():
    def reused(**config):
        reports = []
        sample(fbcache(build(FLUX), ALWAYS, reports.append, **config), FLUX, steps=10)
        return [record.step for record in reports[-1].conditionings["positive"] if record.reused]

    assert reused() == list(range(1, 10))
    assert reused(warmup_steps=4) == [4, 5, 6, 7, 8, 9]
    assert reused(max_consecutive_hits=2) == [1, 2, 4, 5, 7, 8]
    assert reused(start_percent=0.5) == [5, 6, 7, 8, 9]
    assert reused(end_percent=0.5) == [1, 2, 3, 4, 5]
    assert reused(end_percent=0.0) == []


def test_settings_of_the_last_patcher_hold():
    reports = []
    model = fbcache(fbcache(build(FLUX), ALWAYS), 0.0, reports.append)
    assert torch.equal(sample(model, FLUX), sample(build(FLUX), FLUX))
    assert [report.finished for report in reports].count(True) == 1


def test_threshold_0_counts_its_calls_and_leaves_the_blocks_alone():
    replaced, reports = [], []

    def look(executor, *args, **kwargs):
        replaced.append(args[5].get("patches_replace", {}))
        return executor(*args, **kwargs)

    model = fbcache(build(FLUX), 0.0, reports.append)
    # Added behind ours, so called inside it.
    model.add_wrapper_with_key("apply_model", "look", look)
    sample(model, FLUX, cfg=4.0)
    assert replaced and not any(replaced)
    (report,) = reports
    assert {label: len(records) for label, records in report.conditionings.items()} == {"positive": 6, "negative": 6}
    assert (report.num_block_calls, report.num_bytes) == (report.num_block_calls_baseline, 0)
    assert report.advice() == "Nothing is reused at threshold 0."


@pytest.mark.parametrize("threshold", [0.0, ALWAYS])
def test_a_run_is_one_line_in_the_log_however_many_steps_it_has(caplog, threshold):
    from para_core.adapters.comfy_fbcache import last_report

    model = fbcache(build(FLUX), threshold)
    caplog.set_level(logging.DEBUG, logger="para_core")
    for steps in (3, 7):
        caplog.clear()
        sample(model, FLUX, steps=steps, cfg=4.0)
        (line,) = (record for record in caplog.records if record.name.startswith("para_core"))
        assert (line.levelno, line.getMessage()) == (logging.INFO, last_report(model).summary())
        assert f"/{steps}" in line.getMessage() and "\n" not in line.getMessage()


def test_cancelled_run_leaves_nothing_behind():
    import comfy.model_management

    cached = fbcache(build(FLUX), ALWAYS)
    expected = sample(cached, FLUX)

    def cancel(model, x, sigmas):
        model(x, sigmas[0])
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        with_sampler(cached, FLUX, cancel)
    assert torch.equal(sample(cached, FLUX), expected)
