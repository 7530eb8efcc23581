"""Compiled blocks in the real ComfyUI, on tiny models: how often torch compiles, and that nothing else changes.

Mostly with the backend "eager", which traces and guards like the others but generates no code.
"""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from tiny_models import (
    ALWAYS,
    TINY_MODELS,
    add_lora,
    build,
    conditioning,
    fbcache,
    flux_control,
    host_version,
    relative,
    sample,
)
from tiny_models.sampling import with_sampler

pytestmark = pytest.mark.usefixtures("comfy")

FLUX = TINY_MODELS["flux"]
SIZES = [(16, 10, 14), (16, 12, 14), (16, 8, 8), (16, 16, 10), (16, 6, 22), (16, 14, 10)]
PROMPTS = [(7, 5), (9, 9), (3, 12), (16, 2)]
NUM_KINDS = 2  # double_block, single_block


def compiled(patcher, listener=None, directory=None, **settings):
    from para_core.adapters.comfy_compile import apply_compile
    from para_core.compile_config import CompileConfig

    return apply_compile(
        patcher, CompileConfig(**{"backend": "eager"} | settings), listener=listener, directory=directory
    )


def report_of(patcher):
    from para_core.adapters.comfy_compile import last_compile_report

    return last_compile_report(patcher)


def kinds(patcher):
    return [one.name for one in report_of(patcher).compiled]


def forwards(patcher):
    model = patcher.model.diffusion_model
    return [block for block in (*model.double_blocks, *model.single_blocks) if "forward" in block.__dict__]


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        built = build(FLUX)
        if host_version()[:2] < (0, 33):
            # There the first LoRA turns requires_grad off for good, which torch guards: each kind once more.
            sample(add_lora(built, 0.1), FLUX, steps=1)
        return built


@pytest.fixture(scope="module")
def warm(model):
    """Compiled for the first size, and for any other of one picture and of two."""
    with torch.inference_mode():
        patcher = compiled(model)
        for prompts in PROMPTS[:2]:
            sample(patcher, FLUX, cfg=4.0, num_tokens=prompts, steps=1)
        return patcher


def test_each_kind_is_compiled_once_whatever_the_number_of_blocks(model):
    patcher = compiled(model, dynamic="on")
    assert torch.equal(sample(patcher, FLUX), sample(model, FLUX))
    assert kinds(patcher) == ["double_block", "single_block"]
    assert report_of(patcher).num_blocks == 5 and report_of(patcher).uncompiled == {}


def test_no_size_and_no_prompt_length_compiles_again_after_warm_up(model, warm):
    compiled_first = report_of(warm).num_compilations
    assert compiled_first <= 3 * NUM_KINDS
    for latent in SIZES:
        for num_tokens in PROMPTS:
            settings = {"latent": latent, "num_tokens": num_tokens, "cfg": 4.0, "steps": 1}
            assert torch.equal(sample(warm, FLUX, **settings), sample(model, FLUX, **settings))
    assert report_of(warm).num_compilations == compiled_first


def test_a_lora_compiles_nothing_again_before_and_behind_the_node(model, warm):
    before = report_of(warm).num_compilations
    for strength in (0.7, -0.3):
        expected = sample(add_lora(model, strength), FLUX)
        for patcher in (add_lora(warm, strength), compiled(add_lora(model, strength))):
            assert torch.equal(sample(patcher, FLUX), expected)
            assert report_of(patcher).num_compilations == before
    assert relative(sample(warm, FLUX), expected) > 1e-2, "the LoRA has no effect, so this test shows nothing"


@pytest.mark.parametrize("first", ["cache", "compile"])
def test_the_cache_decides_in_python_between_compiled_blocks(model, warm, first):
    before, reports = report_of(warm).num_compilations, []
    expected = sample(fbcache(model, ALWAYS, max_consecutive_hits=1), FLUX, cfg=4.0)
    if first == "cache":
        both = compiled(fbcache(model, ALWAYS, reports.append, max_consecutive_hits=1))
    else:
        both = fbcache(warm, ALWAYS, reports.append, max_consecutive_hits=1)
    assert torch.equal(sample(both, FLUX, cfg=4.0), expected)
    assert [record.reused for record in reports[-1].conditionings["positive"]] == [False, True] * 3
    assert report_of(both).num_compilations == before


def test_the_model_is_untouched_after_a_run_and_after_a_cancelled_one(model, warm):
    import comfy.model_management

    keys = set(model.model.state_dict())
    seen = []

    def cancel(call, x, sigmas):
        call(x, sigmas[0])
        seen.extend(forwards(model))
        raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        with_sampler(warm, FLUX, cancel)
    assert len(seen) == 5 and forwards(model) == [] and set(model.model.state_dict()) == keys
    assert torch.equal(sample(warm, FLUX), sample(model, FLUX))


def test_cancel_takes_effect_between_two_compilations(model):
    import comfy.model_management

    pressed = []

    def press_cancel(report):
        if report.compiling is None and not pressed:  # the first kind is done
            pressed.append(True)
            comfy.model_management.interrupt_current_processing()

    patcher = compiled(model, press_cancel, dynamic="on", fullgraph=True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patcher, FLUX)
    assert kinds(patcher) == ["double_block"]
    assert torch.equal(sample(patcher, FLUX), sample(model, FLUX))


def test_another_nodes_patch_inside_a_block_runs_and_is_named(model, warm):
    calls = []

    def patch(q, k, v, pe=None, attn_mask=None, extra_options=None):
        calls.append(extra_options["block_index"])
        return {"q": 1.1 * q}

    def patched(patcher):
        clone = patcher.clone()
        clone.set_model_attn1_patch(patch)
        return clone

    if torch.equal(sample(patched(model), FLUX), sample(model, FLUX)):
        pytest.skip("this ComfyUI has no patches inside FLUX blocks")
    calls.clear()
    output = sample(patched(warm), FLUX)
    assert len(calls) == 5 * 6 and torch.equal(output, sample(patched(model), FLUX))
    assert report_of(warm).uncompiled == {"another node's patch inside the block (attn1_patch)": 30}


def test_another_nodes_patch_inside_a_unets_attention_runs_and_is_named():
    tiny = TINY_MODELS["sd15"]
    model = build(tiny)

    def patched(patcher):
        clone = patcher.clone()
        clone.set_model_attn1_replace(lambda q, k, v, extra_options: 1.1 * q, "middle", 0, 0)
        return clone

    warm = compiled(model)
    output = sample(patched(warm), tiny, steps=1)
    assert not torch.equal(output, sample(model, tiny, steps=1)), "no effect, so this test shows nothing"
    assert torch.equal(output, sample(patched(model), tiny, steps=1))
    assert all("attn1" in reason for reason in report_of(warm).uncompiled) and report_of(warm).uncompiled


def test_another_nodes_patch_around_a_block_runs(model, warm):
    def around(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": 1.1 * out["img"]}

    def patched(patcher):
        clone = patcher.clone()
        clone.set_model_patch_replace(around, "dit", "single_block", 1)
        return clone

    before = report_of(warm).num_compilations
    assert torch.equal(sample(patched(warm), FLUX), sample(patched(model), FLUX))
    assert report_of(warm).num_compilations == before


def test_controlnet_residuals_compile_nothing_again(model, warm):
    before = report_of(warm).num_compilations
    positive = conditioning(FLUX, 1, control=flux_control())
    expected = sample(model, FLUX, positive=positive)
    assert relative(expected, sample(model, FLUX)) > 0.05
    assert torch.equal(sample(warm, FLUX, positive=positive), expected)
    assert report_of(warm).num_compilations == before


def test_compiled_code_goes_with_the_model():
    from para_core.adapters import comfy_compile

    model = build(FLUX)
    patcher = compiled(model, dynamic="on")
    sample(patcher, FLUX, steps=1)
    compilation = weakref.ref(comfy_compile._compilations[model.model.diffusion_model].popitem()[1])
    assert compilation() is not None
    del model, patcher
    gc.collect()
    assert compilation() is None


def test_an_unknown_model_is_refused_for_blocks_before_sampling(model):
    other = model.clone()
    other.model = type("Other", (), {"diffusion_model": torch.nn.Linear(2, 2)})()
    with pytest.raises(ValueError, match="^Linear is not a model that Para Accelerate knows"):
        compiled(other)


def test_without_a_compiler_the_model_runs_uncompiled_only_if_allowed(model):
    from torch._inductor import config

    with config.patch("cpp.cxx", (None, "no-such-compiler")):
        _uncompiled_only_if_allowed(model)


def _uncompiled_only_if_allowed(model):
    with pytest.raises(ValueError, match="^no C\\+\\+ compiler was found; install one .*; or set allow_uncompiled"):
        compiled(model, backend="inductor")
    patcher = compiled(model, backend="inductor", allow_uncompiled=True)
    assert torch.equal(sample(patcher, FLUX), sample(model, FLUX))
    assert kinds(patcher) == [] and "no C++ compiler" in report_of(patcher).summary()
