"""The first-block cache in the real ComfyUI, on tiny models: exact where nothing is reused, apart where it must be."""

import pytest
import torch
from tiny_models import (
    ALWAYS,
    FLUX,
    NEVER,
    WAN,
    add_lora,
    build,
    conditioning,
    fbcache,
    flux_control,
    relative,
    sample,
    with_sampler,
)

pytestmark = pytest.mark.usefixtures("comfy")

# Two block layouts in every combination; the other models are in test_comfy_families.py.
FAMILIES = pytest.mark.parametrize("tiny", [FLUX, WAN], ids=["flux", "wan"])


@FAMILIES
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("num_tokens", [(7, 7), (9, 5)], ids=["equal", "unequal"])
@pytest.mark.parametrize("threshold", [0.0, NEVER])
def test_never_reusing_is_bit_equal(tiny, cfg, num_tokens, threshold):
    model = build(tiny)
    expected = sample(model, tiny, cfg=cfg, num_tokens=num_tokens)
    assert torch.equal(sample(fbcache(model, threshold), tiny, cfg=cfg, num_tokens=num_tokens), expected)


@FAMILIES
@pytest.mark.parametrize("cfg", [1.0, 4.0])
@pytest.mark.parametrize("num_tokens", [(7, 7), (9, 5)], ids=["equal", "unequal"])
@pytest.mark.parametrize("batch", [1, 2])
def test_hit_on_identical_inputs_reproduces_the_output(tiny, cfg, num_tokens, batch):
    """Were cond and uncond ever exchanged, guidance would come out mirrored."""
    outputs, reports = [], []

    def twice(model, x, sigmas):
        kept = x.clone()
        outputs.extend((model(x, sigmas[0]).clone(), model(x, sigmas[0]).clone()))
        assert torch.equal(x, kept), "the model's input was written to"

    with_sampler(fbcache(build(tiny), 0.01, reports.append), tiny, twice, cfg=cfg, num_tokens=num_tokens, batch=batch)
    report = reports[-1]
    assert [record.reused for record in report.conditionings["positive"]] == [False, True]
    assert len(report.conditionings) == (1 if cfg == 1 else 2)
    assert relative(outputs[1], outputs[0]) <= 1e-5


@FAMILIES
def test_upstream_model_is_unchanged_and_runs_repeat(tiny):
    model = build(tiny)
    before = sample(model, tiny, cfg=4.0)
    cached = fbcache(model, ALWAYS)
    first = sample(cached, tiny, cfg=4.0)
    assert relative(first, before) > 0, "nothing was reused, so this test shows nothing"
    assert torch.equal(sample(model, tiny, cfg=4.0), before)
    assert torch.equal(sample(cached, tiny, cfg=4.0), first)


CHANGES = {
    "seed": {"seed": 5},
    "prompt": {"num_tokens": (11, 3)},
    "batch": {"batch": 2},
    "cfg": {"cfg": 4.0},
    "steps": {"steps": 9},
    "image to image": {"denoise": 0.5},
    "sampler": {"sampler": "heun"},
}


@FAMILIES
@pytest.mark.parametrize("change", [*CHANGES, "size", "lora"])
def test_a_changed_run_equals_a_fresh_start(tiny, change):
    settings = dict(CHANGES.get(change, {}))
    if change == "size":
        settings["latent"] = (*tiny.latent[:-1], tiny.latent[-1] + 4)

    def changed(model):
        cached = fbcache(model, ALWAYS, max_consecutive_hits=2)
        return add_lora(cached, 0.7) if change == "lora" else cached

    used = build(tiny)
    cached = fbcache(used, ALWAYS, max_consecutive_hits=2)
    sample(cached, tiny)
    after = sample(add_lora(cached, 0.7) if change == "lora" else cached, tiny, **settings)
    assert torch.equal(after, sample(changed(build(tiny)), tiny, **settings))


def test_lora_before_and_behind_the_patcher_is_the_same():
    model = build(FLUX)
    plain = sample(fbcache(model, ALWAYS), FLUX)
    before = sample(fbcache(add_lora(model, 0.7), ALWAYS), FLUX)
    assert relative(before, plain) > 1e-2
    assert torch.equal(sample(add_lora(fbcache(model, ALWAYS), 0.7), FLUX), before)


def test_two_models_in_one_graph_stay_apart():
    one, two = build(FLUX, seed=0), build(FLUX, seed=9)
    alone = [sample(fbcache(model, ALWAYS), FLUX) for model in (one, two)]
    cached = [fbcache(model, ALWAYS) for model in (one, two)]
    interleaved = []

    def outer(model, x, sigmas):
        for sigma in sigmas[:2]:
            model(x, sigma)
        interleaved.append(sample(cached[1], FLUX))

    with_sampler(cached[0], FLUX, outer)
    assert torch.equal(interleaved[0], alone[1])
    assert torch.equal(sample(cached[0], FLUX), alone[0])


def test_second_model_of_a_dual_model_guider_has_its_own_residuals():
    from comfy_extras import nodes_custom_sampler

    if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no guider with two models")

    def guided(*models):
        guider = nodes_custom_sampler.Guider_DualModel(*models)
        guider.set_conds(conditioning(FLUX, 1), conditioning(FLUX, 2))
        guider.set_cfg(4.0)
        noise = torch.randn(1, *FLUX.latent, generator=torch.Generator().manual_seed(0))
        outputs = []

        def twice(model, x, sigmas, extra_args, callback, disable, **_):
            sigma = sigmas[:1]
            outputs.extend(model(x, sigma, **extra_args).clone() for _ in range(2))
            return x

        import comfy.samplers

        guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(twice), torch.linspace(1, 0, 5), seed=0)
        return outputs

    one, two = build(FLUX, seed=0), build(FLUX, seed=9)
    (expected, _), (first, second) = guided(one, two), guided(fbcache(one, 0.01), two)
    assert torch.equal(first, expected)
    assert relative(second, expected) <= 1e-5


def test_controlnet_residuals_count_once_on_a_hit():
    positive = conditioning(FLUX, 1, control=flux_control())
    outputs = []

    def twice(model, x, sigmas):
        outputs.extend(model(x, sigmas[0]).clone() for _ in range(2))

    model = build(FLUX)
    with_sampler(model, FLUX, twice)
    reports = []
    with_sampler(fbcache(model, 0.01, reports.append), FLUX, twice, positive=positive)
    without, _, computed, reused = outputs
    assert reports[-1].num_reused_calls == 1
    assert relative(computed, without) > 0.05, "the residuals have no effect, so this test shows nothing"
    assert relative(reused, computed) <= 1e-5


@pytest.mark.parametrize("wired", ["before", "behind"])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_another_packs_patch_at_the_same_block_still_runs(wired, index):
    calls = []

    def foreign(args, extra):
        calls.append(args["transformer_options"]["sigmas"])
        out = extra["original_block"](args)
        return {**out, "img": out["img"] + 0.1 * out["img"].roll(1, -1)}

    def patched(model):
        clone = model.clone()
        clone.set_model_patch_replace(foreign, "dit", "single_block", index)
        return clone

    model = build(FLUX)
    expected = sample(patched(model), FLUX)
    assert relative(sample(model, FLUX), expected) > 1e-3
    calls.clear()
    both = fbcache(patched(model), NEVER) if wired == "before" else patched(fbcache(model, NEVER))
    assert torch.equal(sample(both, FLUX), expected)
    assert len(calls) == 6
    assert torch.equal(sample(patched(model), FLUX), expected), "the other pack's own branch has changed"


@pytest.mark.parametrize("threshold", [NEVER, ALWAYS])
def test_skip_layer_guidance_keeps_its_own_residuals(threshold):
    """Its extra pass has the conditioning of the positive one, and overwrites patches of single blocks, ours too."""
    from comfy_extras.nodes_slg import SkipLayerGuidanceDiT

    def guided(model):
        layers = {"double_layers": "1", "single_layers": "0, 2"}
        return SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, **layers).args[0]

    model = build(FLUX)
    reports = []
    output = sample(fbcache(guided(model), threshold, reports.append), FLUX, cfg=4.0)
    assert set(reports[-1].conditionings) == {"positive", "negative", "positive #2"}
    if threshold == NEVER:
        assert torch.equal(output, sample(guided(model), FLUX, cfg=4.0))
    else:
        assert torch.equal(sample(guided(fbcache(model, threshold)), FLUX, cfg=4.0), output)
