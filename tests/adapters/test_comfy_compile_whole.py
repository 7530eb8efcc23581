"""Scope model in the real ComfyUI: each size compiled once and exact, and what cannot be in one piece is said."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adapters.quantization_cases import quantize
from tiny_models import FLUX, add_lora, build, fbcache, host_version, relative, sample

pytestmark = pytest.mark.usefixtures("comfy")

SMALL = dataclasses.replace(FLUX, unet_config=FLUX.unet_config | {"depth": 1, "depth_single_blocks": 1})
SIZES = [(16, 10, 14), (16, 12, 14), (16, 7, 8)]
PROMPTS = [7, 12]


def compiled(patcher, **settings):
    from para_core.adapters.comfy_compile import apply_compile
    from para_core.compile_config import CompileConfig

    return apply_compile(patcher, CompileConfig(**{"scope": "model", "backend": "aot_eager"} | settings))


def report_of(patcher):
    from para_core.adapters.comfy_compile import last_compile_report

    return last_compile_report(patcher)


@pytest.fixture(scope="module")
def model(comfy):
    with torch.inference_mode():
        built = build(SMALL)
        if host_version()[:2] < (0, 33):
            # There the first LoRA turns requires_grad off for good, which torch guards: each kind once more.
            sample(add_lora(built, 0.1), SMALL, steps=1)
        return built


@pytest.fixture(scope="module")
def warm(model):
    """Compiled for the first size."""
    with torch.inference_mode():
        patcher = compiled(model)
        sample(patcher, SMALL, steps=1)
        return patcher


def test_each_size_is_compiled_once_and_exact(model, warm):
    for _ in range(2):
        for latent in SIZES:
            for tokens in PROMPTS:
                settings = {"latent": latent, "num_tokens": (tokens, 5), "steps": 1}
                output, expected = sample(warm, SMALL, **settings), sample(model, SMALL, **settings)
                assert relative(output, expected) <= 1e-5, settings
    assert report_of(warm).num_compilations == len(SIZES) * len(PROMPTS)
    assert report_of(warm).uncompiled == {}


def test_generated_code_is_as_exact_as_float32(model):
    patcher = compiled(model, backend="inductor")
    assert relative(sample(patcher, SMALL, steps=2), sample(model, SMALL, steps=2)) <= 1e-5
    assert [one.name for one in report_of(patcher).compiled] == ["Flux"]


def test_a_lora_compiles_nothing_again(model, warm):
    before = report_of(warm).num_compilations
    assert relative(sample(add_lora(warm, 0.7), SMALL), sample(add_lora(model, 0.7), SMALL)) <= 1e-5
    assert report_of(warm).num_compilations == before


@pytest.mark.parametrize(
    "scheme", ["fp8_dynamic_per_row", "fp8_weight_only", "int8_weight_only", "int8_dynamic_per_row"]
)
def test_quantized_models_are_compiled_whole(model, scheme):
    quantized = quantize(model, scheme)
    patcher = compiled(quantized)
    assert relative(sample(patcher, SMALL, steps=1), sample(quantized, SMALL, steps=1)) <= 1e-5
    assert len(report_of(patcher).compiled) == 1 and report_of(patcher).uncompiled == {}


@pytest.mark.parametrize("first", ["cache", "compile"])
def test_the_cache_is_refused_or_decides_uncompiled(model, first):
    def both(**settings):
        if first == "cache":
            return compiled(fbcache(model, 100.0, max_consecutive_hits=1), **settings)
        return fbcache(compiled(model, **settings), 100.0, max_consecutive_hits=1)

    with pytest.raises(ValueError, match="^scope model compiles in one piece what the FBCache .* choose scope blocks"):
        sample(both(), SMALL)
    patcher = both(allow_uncompiled=True)
    expected = sample(fbcache(model, 100.0, max_consecutive_hits=1), SMALL)
    assert not torch.equal(expected, sample(model, SMALL)), "nothing is reused, so this test shows nothing"
    assert torch.equal(sample(patcher, SMALL), expected)
    assert report_of(patcher).uncompiled == {"another node's patch inside the model (FBCache Patcher)": 6}


def test_patches_of_other_nodes_run_and_are_named(model, warm):
    def around(args, extra):
        out = extra["original_block"](args)
        return {**out, "img": 1.1 * out["img"]}

    def wrapper(executor, *args, **kwargs):
        return 1.1 * executor(*args, **kwargs)

    def replaced(patcher):
        clone = patcher.clone()
        clone.set_model_patch_replace(around, "dit", "single_block", 0)
        return clone

    def wrapped(patcher):
        import comfy.patcher_extension

        clone = patcher.clone()
        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "other", wrapper)
        return clone

    for patched, name in ((replaced, "dit"), (wrapped, "other")):
        expected = sample(patched(model), SMALL, steps=2)
        assert not torch.equal(expected, sample(model, SMALL, steps=2))
        assert torch.equal(sample(patched(warm), SMALL, steps=2), expected)
        assert report_of(warm).uncompiled == {f"another node's patch inside the model ({name})": 2}
