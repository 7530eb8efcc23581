"""Compiled blocks in the real ComfyUI while it offloads, frees and loads weights: same numbers, compiled once."""

from __future__ import annotations

import pytest
import torch
from adapters.quantization_cases import add_lora, call, quantize
from tiny_models import FLUX, build, host_version

pytestmark = pytest.mark.usefixtures("comfy")

MOVED = "its weights are offloaded, with a LoRA on them"
SOME = 3_000_000  # bytes, of three blocks or more
KINDS = 2


def compiled(patcher):
    from para_core.adapters.comfy_compile import apply_compile
    from para_core.compile_config import CompileConfig

    return apply_compile(patcher, CompileConfig(backend="eager"))


def report_of(patcher):
    from para_core.adapters.comfy_compile import last_compile_report

    return last_compile_report(patcher)


@pytest.fixture(scope="module", params=[None, "int8_weight_only", "fp8_dynamic_per_row"], ids=["float", "int8", "fp8"])
def pair(comfy, request):
    """(the model, the same with compiled blocks, which has run once)"""
    with torch.inference_mode():
        model = build(FLUX) if request.param is None else quantize(build(FLUX), request.param)
        patcher = compiled(model)
        call(patcher)
        assert report_of(patcher).num_compilations == KINDS
        return model, patcher


def test_offloading_compiles_nothing_again_once_it_has_been_met(pair):
    model, patcher = pair
    expected = call(model)

    def once():
        for unload in (SOME, 0):
            assert torch.equal(call(patcher, unload=unload), expected)
            assert report_of(patcher).uncompiled == {}
        return report_of(patcher).num_compilations

    # Where a layer has its weight is in the code: all of them here, all elsewhere, some, and here again.
    assert once() <= 4 * KINDS
    assert once() == once()


def test_blocks_whose_offloaded_weights_carry_a_lora_run_uncompiled(pair):
    model, patcher = pair
    with_lora, expected = add_lora(patcher), add_lora(model)
    assert torch.equal(call(with_lora), call(expected)) and report_of(patcher).uncompiled == {}
    assert torch.equal(call(with_lora, unload=SOME), call(expected, unload=SOME))
    uncompiled = report_of(patcher).uncompiled
    if host_version()[:2] >= (0, 33):  # before, the host merges the LoRA into what it offloads
        assert list(uncompiled) == [MOVED] and 0 < uncompiled[MOVED] <= 5
        assert f"{uncompiled[MOVED]} block calls uncompiled: {MOVED}" in report_of(patcher).summary()
    assert torch.equal(call(with_lora), call(expected)) and report_of(patcher).uncompiled == {}


def test_a_freed_model_needs_no_new_compilation(pair):
    import comfy.model_management

    model, patcher = pair
    expected = call(model)
    before = report_of(patcher).num_compilations
    comfy.model_management.unload_all_models()
    assert torch.equal(call(patcher), expected)
    assert report_of(patcher).num_compilations == before
