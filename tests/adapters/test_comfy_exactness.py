"""What else a workflow does to a model, on the models where it matters: with the cache it stays exact."""

import inspect
from dataclasses import replace

import pytest
import torch
from tiny_models import TINY_MODELS, build, conditioning, fbcache, host_version, relative, sample, with_sampler

pytestmark = pytest.mark.usefixtures("comfy")

ALWAYS = 100.0  # random weights change far more from step to step than trained ones do
SD15, FLUX, WAN, LUMINA2 = (TINY_MODELS[name] for name in ("sd15", "flux", "wan", "lumina2"))


def node(path, /, *args, **kwargs):
    """A patch of a MODEL by one of ComfyUI's own nodes, as module.class; settings it does not know are left out."""
    module, name = path.split(".")

    def patch(model):
        found = getattr(__import__(f"comfy_extras.{module}", fromlist=[name]), name, None)
        if found is None:
            pytest.skip(f"this ComfyUI has no {name}")
        function = found.execute if hasattr(found, "execute") else getattr(found(), found.FUNCTION)
        known = inspect.signature(function).parameters
        result = function(model, *args, **{key: value for key, value in kwargs.items() if key in known})
        return getattr(result, "args", result)[0]

    return patch


def twice(patcher, tiny, **settings):
    """Two guided model calls with identical inputs."""
    outputs = []

    def call(model, x, sigmas):
        outputs.extend(model(x, sigmas[0]).clone() for _ in range(2))

    with_sampler(patcher, tiny, call, **settings)
    return outputs


def check(tiny, patch=lambda model: model, **settings):
    """Computed calls are bit-equal, reused ones reproduce them, wherever the patch is wired; returns the report."""
    model = build(tiny)
    expected, _ = twice(patch(model), tiny, **settings)
    for wired in (lambda *args: fbcache(patch(model), *args), lambda *args: patch(fbcache(model, *args))):
        reports = []
        computed, reused = twice(wired(0.01, reports.append), tiny, **settings)
        assert torch.equal(computed, expected)
        for label, records in reports[-1].conditionings.items():
            assert [record.reused for record in records] == [False, True], label
        assert relative(reused, computed, tiny) <= 1e-5
    plain = {name: value for name, value in settings.items() if name in ("cfg", "batch")}
    assert relative(expected, twice(build(tiny), tiny, **plain)[0]) > 1e-3, "no effect, so this test shows nothing"
    return reports[-1]


GUIDANCE = {
    "skip layers": ("flux", node("nodes_slg.SkipLayerGuidanceDiT", 3.0, 0.0, 1.0, "1", "0, 2")),
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
    assert torch.equal(sample(fbcache(model, 0.0), LUMINA2, cfg=4.0, sampler=sampler), expected)
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
    report = check(replace(WAN, latent=(16, 8, 4, 6)), windows, cfg=4.0)
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
    assert torch.equal(sample(fbcache(model, 0.0), tiny, **settings), expected)
    cached = fbcache(model, ALWAYS, reports.append)
    first = sample(cached, tiny, **settings)
    assert reports[-1].num_reused_calls > 0
    assert torch.equal(sample(cached, tiny, **settings), first)


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


def test_feature_maps_that_change_size_within_a_run():
    """Deep Shrink: the inner blocks work at half the size for the first steps only, reused steps in between."""

    def shrink(model, end_percent=0.5):
        settings = (2, 2.0, 0.0, end_percent, True, "bicubic", "bicubic")
        return node("nodes_model_downscale.PatchModelAddDownscale", *settings)(model)

    model, reports = build(SD15), []
    expected = sample(shrink(model), SD15, steps=8)
    assert relative(sample(model, SD15, steps=8), expected) > 1e-3
    assert torch.equal(sample(fbcache(shrink(model), 0.0), SD15, steps=8), expected)
    for patched in (fbcache(shrink(model), ALWAYS, reports.append), shrink(fbcache(model, ALWAYS, reports.append))):
        assert sample(patched, SD15, steps=8).isfinite().all()
        assert reports[-1].num_reused_calls == 7
    check(SD15, lambda model: shrink(model, end_percent=1.0))


def test_patches_of_skip_connections():
    check(TINY_MODELS["sdxl"], node("nodes_freelunch.FreeU_V2", 1.3, 1.4, 0.9, 0.2), cfg=4.0)


def control(tiny, residuals):
    """A ControlNet as the model sees it; residuals(batch, randn) gives a fresh dict of lists."""
    import comfy.controlnet

    class Fixed(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            generator = torch.Generator().manual_seed(4)
            return residuals(lambda *shape: torch.randn(x_noisy.shape[0], *shape, generator=generator))

    return conditioning(tiny, 1, control=Fixed())


CONTROLLED = {  # tokens and width of the model
    "flux": (35, 256), "chroma": (35, 64), "hunyuan_video": (45, 64), "sd3": (35, 128), "qwen_image": (35, 64),
    "mage_flow": (35, 64), "lens": (35, 64),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTROLLED)
def test_controlnet_residuals_count_once(name):
    def residuals(randn):
        # Behind the first block, some in between, and the last one: that comes after what is remembered.
        one = randn(*CONTROLLED[name])
        return {"input": [one, None, 0.5 * one, 0.3 * one], "output": [one, None, -0.7 * one, 0.4 * one]}

    tiny = TINY_MODELS[name]
    check(tiny, positive=control(tiny, residuals))


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_controlnet_residuals_of_a_unet_count_once(name):
    tiny, maps = TINY_MODELS[name], []

    def remember(h, options):
        maps.append(h.shape[1:])
        return h

    model = build(tiny)
    model.set_model_input_block_patch(remember)
    with_sampler(model, tiny, lambda model, x, sigmas: model(x, sigmas[0]))

    def residuals(randn):
        return {
            "input": [randn(*shape) for shape in reversed(maps)],
            "middle": [randn(*maps[-1])],
            "output": [randn(*shape) for shape in maps],
        }

    check(tiny, positive=control(tiny, residuals))


@pytest.mark.parametrize(("num_branch_blocks", "num_computed"), [(2, 2), (4, 8)])
def test_the_vace_branch_rests_on_a_reused_step(num_branch_blocks, num_computed):
    """Of 4 blocks, 2 of the branch end before the last one; 4 add something behind it, which nothing remembers."""
    tiny = TINY_MODELS["wan_vace"]
    tiny = replace(tiny, unet_config=tiny.unet_config | {"vace_layers": num_branch_blocks})
    check(tiny, cfg=4.0, positive=conditioning(tiny, 1, vace_strength=[2.0]))
    model, calls = build(tiny), []
    for block in model.model.diffusion_model.vace_blocks:
        block.self_attn.register_forward_hook(lambda *args: calls.append(args))
    twice(fbcache(model, 0.01), tiny)
    assert len(calls) == num_computed


@pytest.mark.parametrize("name", ["wan", "qwen_image", "lumina2", "lens", "mage_flow"])
def test_patches_behind_a_block_may_write_in_place(name):
    if name in ("wan", "qwen_image", "lumina2") and host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 calls no patches behind the blocks of this model")

    def patch(args):
        args["img"].add_(args["img"].roll(1, -1), alpha=0.1)
        return args

    def patched(model):
        clone = model.clone()
        clone.set_model_patch(patch, "double_block")
        return clone

    check(TINY_MODELS[name], patched)
