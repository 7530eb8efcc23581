"""What else a workflow does to a model, on the models where it matters: with the cache it stays exact."""

from dataclasses import replace

import pytest
import torch
from tiny_models import ALWAYS, NEVER, TINY_MODELS, build, check, conditioning, fbcache, node, relative, sample, twice

pytestmark = pytest.mark.usefixtures("comfy")

LUMINA2 = TINY_MODELS["lumina2"]


GUIDANCE = {
    "skip layers": ("flux", node("nodes_slg.SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "1", "0, 2")),
    "skip layers of joint blocks": ("sd3", node("nodes_sd3.SkipLayerGuidanceSD3", "1, 2", 3.0, 0.0, 1.0)),
    "skip layers of video": ("wan", node("nodes_slg.SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "1, 3", "")),
    "skip layers simple": ("flux", node("nodes_slg.SkipLayerGuidanceDiTSimple", 0.0, 1.0, "1", "0, 2")),
    "perturbed attention": ("sd15", node("nodes_pag.PerturbedAttentionGuidance", 3.0)),
    "self attention": ("sd15", node("nodes_sag.SelfAttentionGuidance", 0.5, 2.0)),
    "spatio-temporal": ("ltxav", node("nodes_lt.LTXVSpatioTemporalGuidance", 1.0, "2", 0.0, 1.0)),
    "modality": ("ltxav", node("nodes_lt.LTXVModalityGuidance", 3.0, 0.0, 1.0)),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_extra_passes_of_guidance_keep_their_own_residuals(name):
    """They have the conditioning, the step and mostly the latent of the main pass: only what the blocks do differs."""
    model, patch = GUIDANCE[name]
    check(TINY_MODELS[model], patch, cfg=4.0)


def extra_pass(*, times=99, without=(), **switches):
    """Guidance away from one more pass of the positive: without some of what it carries, or with switches thrown."""
    import comfy.samplers

    def patch(model):
        clone, num_passes = model.clone(), []

        def guide(args):
            if len(num_passes) == times:
                return args["denoised"]
            num_passes.append(1)
            strip = {name: value for name, value in args["cond"][0]["model_conds"].items() if name not in without}
            options = args["model_options"]
            options = {**options, "transformer_options": {**options["transformer_options"], **switches}}
            cond = [{**args["cond"][0], "model_conds": strip}]
            (other,) = comfy.samplers.calc_cond_batch(args["model"], [cond], args["input"], args["sigma"], options)
            return args["denoised"] + args["cond_denoised"] - other

        clone.set_model_sampler_post_cfg_function(guide)
        return clone

    return patch


def test_a_pass_with_less_under_the_same_id_keeps_its_own_residuals():
    check(TINY_MODELS["flux"], extra_pass(without=["y"]), cfg=4.0)


def test_passes_that_come_and_go_are_told_apart():
    """The first pass is made once only, so that the second is the first of its kind in the next evaluation."""
    tiny = TINY_MODELS["ltxav"]
    model = build(tiny)

    def guided(model):
        once = extra_pass(times=1, stg_self_attn_blocks=frozenset({1}))
        return extra_pass(stg_self_attn_blocks=frozenset({2}))(once(model))

    expected = twice(guided(model), tiny, cfg=4.0)
    assert relative(*expected) > 1e-3
    outputs = twice(fbcache(guided(model), 0.01), tiny, cfg=4.0)
    assert all(relative(*pair, tiny) <= 1e-5 for pair in zip(outputs, expected, strict=True))


@pytest.mark.parametrize("sampler", ["heun", "dpm_2", "dpmpp_2s_ancestral", "uni_pc"])
def test_samplers_that_evaluate_between_the_steps(sampler):
    model, reports = build(LUMINA2), []
    expected = sample(model, LUMINA2, cfg=4.0, sampler=sampler)
    assert torch.equal(sample(fbcache(model, NEVER), LUMINA2, cfg=4.0, sampler=sampler), expected)
    cached = fbcache(model, ALWAYS, reports.append)
    first = sample(cached, LUMINA2, cfg=4.0, sampler=sampler)
    records = reports[-1].conditionings
    assert set(records) == {"positive", "negative"}
    assert all([record.reused for record in found] == [False] + [True] * (len(found) - 1) for found in records.values())
    assert torch.equal(sample(cached, LUMINA2, cfg=4.0, sampler=sampler), first)


def test_context_windows_have_their_own_residuals():
    windows = node(
        "nodes_context_windows.ContextWindowsManualNode", context_length=4, context_overlap=2, context_stride=1,
        context_schedule="standard_static", closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False,
        causal_window_fix=False,
    )  # fmt: skip
    report = check(replace(TINY_MODELS["wan"], latent=(16, 8, 4, 6)), windows, cfg=4.0)
    assert len(report.conditionings) == 6


def regional(tiny):
    _, height, width = tiny.latent
    left = conditioning(tiny, 1, 9, area=(height, width // 2, 0, 0), strength=1.0)
    right = conditioning(tiny, 3, 5, area=(height - 2, width - 4, 2, 4), strength=0.8)
    mask = torch.zeros(1, height, width)
    mask[:, : height // 2] = 1
    masked = conditioning(tiny, 4, 7, mask=mask, mask_strength=0.7)
    return left + right + masked


@pytest.mark.parametrize("name", ["flux", "sd15", "lumina2"])
@pytest.mark.parametrize("batch", [1, 2])
def test_areas_masks_and_regional_prompts_of_different_sizes(name, batch):
    report = check(TINY_MODELS[name], cfg=4.0, batch=batch, positive=regional(TINY_MODELS[name]))
    # For an area that the negative lacks, the host makes one with the id of the positive.
    numbered = [f"{role}{number}" for role in ("positive", "negative") for number in ("", " #2", " #3")]
    assert set(report.conditionings) == set(numbered)


@pytest.mark.parametrize("name", ["sd15", "lumina2", "wan_5b", "ltxv", "ltxav"])
@pytest.mark.parametrize("denoise", [1.0, 0.5])
def test_inpainting_and_image_to_image(name, denoise):
    """The video models give each token or frame its own timestep."""
    tiny = TINY_MODELS[name]
    mask = torch.ones(1, 1, *tiny.parts[0][1:])
    mask[:, :, :1] = 0
    settings = {"noise_mask": mask, "denoise": denoise, "cfg": 4.0, "steps": 4}
    model, reports = build(tiny), []
    expected = sample(model, tiny, **settings)
    assert torch.equal(sample(fbcache(model, NEVER), tiny, **settings), expected)
    cached = fbcache(model, ALWAYS, reports.append)
    first = sample(cached, tiny, **settings)
    assert reports[-1].num_reused_calls > 0
    assert torch.equal(sample(cached, tiny, **settings), first)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_hit_in_the_middle_of_an_image_to_image_run(name):
    check(TINY_MODELS[name], cfg=4.0, denoise=0.5)


@pytest.mark.parametrize("name", ["skip layers of joint blocks", "skip layers of video"])
@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_a_run_with_an_extra_pass_is_bit_equal_where_nothing_is_reused(name, decision):
    model, patch = GUIDANCE[name]
    tiny, reports = TINY_MODELS[model], []
    guided = patch(build(tiny))
    expected = sample(guided, tiny, steps=4, cfg=4.0)
    cached = fbcache(guided, NEVER, reports.append, decision=decision)
    assert torch.equal(sample(cached, tiny, steps=4, cfg=4.0), expected)
    assert {name: len(found) for name, found in reports[-1].conditionings.items()} == {
        "positive": 4, "negative": 4, "positive #2": 4
    }  # fmt: skip


@pytest.mark.parametrize("name", ["wan_5b", "ltxv", "ltxav"])
def test_timesteps_of_tokens(name):
    tiny = TINY_MODELS[name]
    mask = torch.ones(1, 1, *tiny.parts[0][1:])
    mask[:, :, :1] = 0.3
    check(tiny, cfg=4.0, noise_mask=mask)


def test_a_nested_latent_without_sound():
    tiny = TINY_MODELS["ltxav"]
    silent = replace(tiny, latent=tiny.parts[0])
    reports = []
    outputs = twice(fbcache(build(tiny), 0.01, reports.append), silent)
    assert relative(*outputs) <= 1e-5 and reports[-1].num_reused_calls == 1


def test_cancelling_inside_a_block_leaves_the_model_as_it_was():
    import comfy.model_management

    model = build(LUMINA2)
    expected, blocks = sample(model, LUMINA2), model.model.diffusion_model.layers
    cached = fbcache(model, ALWAYS)
    first = sample(cached, LUMINA2)
    handle = blocks[2].attention.register_forward_pre_hook(raise_interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(cached, LUMINA2)
    handle.remove()
    assert all("forward" not in vars(block) for block in blocks)
    assert torch.equal(sample(model, LUMINA2), expected)
    assert torch.equal(sample(cached, LUMINA2), first)


def raise_interrupt(*_):
    import comfy.model_management

    raise comfy.model_management.InterruptProcessingException


@pytest.mark.parametrize("name", ["flux", "sd15"])
def test_cfg_1_then_cfg_4_in_one_graph(name):
    """Two samplers on one MODEL; the host leaves the negative out of the first."""
    tiny = TINY_MODELS[name]
    cached = fbcache(build(tiny), ALWAYS)
    together = [sample(cached, tiny, cfg=cfg) for cfg in (1.0, 4.0, 1.0)]
    alone = [sample(fbcache(build(tiny), ALWAYS), tiny, cfg=cfg) for cfg in (1.0, 4.0)]
    assert torch.equal(together[0], alone[0]) and torch.equal(together[1], alone[1])
    assert torch.equal(together[2], alone[0])
