"""The prediction decision and the target speedup in the real ComfyUI: as exact and as clean as the plain cache."""

import pytest
import torch
from tiny_models import FLUX, NEVER, TINY_MODELS, all_foreseen, build, conditioning, relative, sample, with_sampler

pytestmark = pytest.mark.usefixtures("comfy")

TINY = pytest.mark.parametrize("tiny", [TINY_MODELS[name] for name in ("flux", "wan", "ltxav")], ids=lambda t: t.family)
ORDERS = pytest.mark.parametrize("order", [0, 1, 2])


def fbcache(patcher, listener=None, **config):
    from para_core.adapters.comfy_fbcache import apply_fbcache
    from para_core.residual_cache import CacheConfig

    return apply_fbcache(patcher, CacheConfig(decision="prediction", **config), listener=listener)


@TINY
@ORDERS
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_never_reusing_is_bit_equal(tiny, order, cfg):
    model = build(tiny)
    cached = fbcache(model, residual_diff_threshold=NEVER, order=order)
    assert torch.equal(flat(sample(cached, tiny, cfg=cfg)), flat(sample(model, tiny, cfg=cfg)))


@TINY
@ORDERS
def test_hit_on_identical_inputs_reproduces_the_output(tiny, order):
    outputs, reports = [], []

    def calls(model, x, sigmas):
        for sigma in (sigmas[0], sigmas[1], sigmas[1]):
            kept = x.clone()
            outputs.append(model(x, sigma).clone())
            assert torch.equal(x, kept), "the model's input was written to"

    cached = fbcache(build(tiny), reports.append, residual_diff_threshold=1e-3, order=order)
    with_sampler(cached, tiny, calls, cfg=4.0)
    assert [record.reused for record in reports[-1].conditionings["positive"]] == [False, False, True]
    assert relative(flat(outputs[2]), flat(outputs[1])) <= 1e-5


@TINY
def test_runs_repeat_and_leave_the_upstream_model_as_it_was(tiny):
    model = build(tiny)
    before = flat(sample(model, tiny, cfg=4.0, steps=8))
    cached = fbcache(model, residual_diff_threshold=100.0, max_consecutive_hits=2, order=1)
    first = flat(sample(cached, tiny, cfg=4.0, steps=8))
    assert relative(first, before) > 0, "nothing was reused, so this test shows nothing"
    assert torch.equal(flat(sample(cached, tiny, cfg=4.0, steps=8)), first)
    assert torch.equal(flat(sample(model, tiny, cfg=4.0, steps=8)), before)


def test_correction_reaches_the_output_of_the_computed_step():
    """Two equal steps, one reused in between at another time: the third call gives more than the model alone."""
    outputs = {}
    for name, wrap in (("plain", lambda model: model), ("cached", None)):
        model = build(FLUX)
        model = model if wrap else fbcache(model, residual_diff_threshold=100.0, max_consecutive_hits=1, order=0)
        calls = outputs[name] = []
        with_sampler(model, FLUX, lambda model, x, sigmas, calls=calls: calls.extend(model(x, s) for s in sigmas[:3]))
    plain, cached = outputs["plain"], outputs["cached"]
    assert torch.equal(plain[0], cached[0])
    assert relative(cached[1], plain[1]) > 1e-4
    assert 1e-4 < relative(cached[2], plain[2]) < 1


@pytest.mark.parametrize("target", [1.3, 2.0, 3.0])
@pytest.mark.parametrize("sampler", ["euler", "heun"])
@pytest.mark.parametrize("num_tokens", [(7, 7), (9, 5)], ids=["batched", "split"])
def test_target_speedup_is_met_within_a_tenth(target, sampler, num_tokens):
    reports = []
    model = build(FLUX)
    cached = fbcache(model, reports.append, target_speedup=target, order=1)
    sample(cached, FLUX, steps=30, cfg=4.0, sampler=sampler, num_tokens=num_tokens)
    report = reports[-1]
    assert report.num_block_calls_baseline / report.num_block_calls == pytest.approx(target, rel=0.1)


def test_target_speedup_that_the_blocks_cannot_give_is_refused_before_sampling():
    with pytest.raises(ValueError, match="^target_speedup is 5; this model has 5 blocks, of which one runs wherever"):
        fbcache(build(FLUX), target_speedup=5.0)


def test_another_packs_patch_at_block_0_is_called_at_every_step():
    calls, reports = [], []

    def patch(args, extra):
        calls.append(1)
        return extra["original_block"](args)

    model = build(FLUX)
    cached = fbcache(model, reports.append, residual_diff_threshold=100.0, order=1)
    model_with_patch = cached.clone()
    model_with_patch.set_model_patch_replace(patch, "dit", "double_block", 0)
    sample(cached, FLUX, steps=8)
    free = reports[-1]
    sample(model_with_patch, FLUX, steps=8)
    assert len(calls) == 8 and reports[-1].num_block_calls == 5 + 7
    assert free.num_block_calls < reports[-1].num_block_calls, "all were measured, so this test shows nothing"


def test_first_block_decision_measures_every_step():
    from para_core.adapters.comfy_fbcache import apply_fbcache
    from para_core.residual_cache import CacheConfig

    reports = []
    with all_foreseen():
        sample(apply_fbcache(build(FLUX), CacheConfig(100.0, order=1), listener=reports.append), FLUX, steps=8)
    records = reports[-1].conditionings["positive"]
    assert all(record.reused and record.diff is not None for record in records[1:])


def test_controlnet_residuals_count_once_on_a_hit():
    import comfy.controlnet

    class FixedControl(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            _, height, width = FLUX.latent
            size = (x_noisy.shape[0], height // 2 * (width // 2), FLUX.unet_config["hidden_size"])
            residual = torch.randn(size, generator=torch.Generator().manual_seed(4))
            return {"input": [residual], "output": [residual, None, -0.7 * residual]}

    outputs = []
    with_sampler(
        fbcache(build(FLUX), residual_diff_threshold=0.01, order=1),
        FLUX,
        lambda model, x, sigmas: outputs.extend(model(x, sigmas[0]).clone() for _ in range(2)),
        positive=conditioning(FLUX, 1, control=FixedControl()),
    )
    assert relative(outputs[1], outputs[0]) <= 1e-5


def flat(output):
    return torch.cat([part.flatten() for part in output.unbind()]) if getattr(output, "is_nested", False) else output
