"""What other nodes add to a model's blocks, on the models where it matters: counted once, with the cache as without."""

from dataclasses import replace

import pytest
import torch
from tiny_models import (
    ALWAYS,
    NEVER,
    TINY_MODELS,
    build,
    check,
    conditioning,
    fbcache,
    host_version,
    node,
    relative,
    sample,
    twice,
    with_sampler,
)

pytestmark = pytest.mark.usefixtures("comfy")

SD15 = TINY_MODELS["sd15"]


def test_feature_maps_that_change_size_within_a_run():
    """Deep Shrink: the inner blocks work at half the size for the first steps only, reused steps in between."""

    def shrink(model, end_percent=0.5):
        settings = (2, 2.0, 0.0, end_percent, True, "bicubic", "bicubic")
        return node("nodes_model_downscale.PatchModelAddDownscale", *settings)(model)

    model, reports = build(SD15), []
    expected = sample(shrink(model), SD15, steps=8)
    assert relative(sample(model, SD15, steps=8), expected) > 1e-3
    assert torch.equal(sample(fbcache(shrink(model), NEVER), SD15, steps=8), expected)
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
