"""Text that the host prepares with a diffusion model's weights before the run, where that runs elsewhere."""

from dataclasses import replace

import pytest
import torch
from adapters.parts_cases import on, run
from fixtures_in_process import Context
from tiny_models import TINY_MODELS, build, relative

pytestmark = pytest.mark.usefixtures("comfy")

FLUX, QWEN, SD3, ANIMA = (TINY_MODELS[name] for name in ("flux", "qwen_image", "sd3", "anima"))

# Text as its encoder leaves it, for the model's two connectors to process.
LTXAV = replace(
    TINY_MODELS["ltxav"],
    unet_config=TINY_MODELS["ltxav"].unet_config | {"connector_attention_head_dim": 32},
    context_dim=64,
    extra=lambda tiny, generator, num_tokens: {"unprocessed_ltxav_embeds": True},
)

TEXTS = pytest.mark.parametrize(
    ("tiny", "layer"),
    [
        (ANIMA, "llm_adapter.out_proj"),
        (LTXAV, "video_embeddings_connector.transformer_1d_blocks.0.ff.net.2"),
    ],
    ids=["anima", "ltxav"],
)


def quantized(layer, model):
    from para_core.adapters.comfy_quantization import apply_quantization
    from para_core.quantization_plan import Selection

    found, report = apply_quantization(model, "int8_weight_only", Selection(include=(f"{layer}*",)))
    assert f"diffusion_model.{layer}" in found.object_patches
    return found


@TEXTS
def test_text_is_prepared_with_the_loras_and_the_quantized_weights_of_the_model(elsewhere, tiny, layer):
    model = build(tiny)
    plain = run(model, tiny)
    for changed in (model, on(layer, model), quantized(layer, model), quantized(layer, on(layer, model))):
        expected = run(changed, tiny)
        assert torch.equal(run(elsewhere(changed), tiny), expected)
        assert changed is model or relative(expected, plain, tiny) > 1e-5, "a layer without effect would hide it"
    assert torch.equal(run(elsewhere(model), tiny), plain)


@TEXTS
def test_text_is_prepared_on_two_ranks(on_two_ranks, tiny, layer):
    changed = quantized(layer, on(layer, build(tiny)))
    expected = run(changed, tiny, cfg=1.0)
    there = run(on_two_ranks(changed), tiny, cfg=1.0)
    assert relative(there, expected, tiny) <= 1e-6
    assert relative(expected, run(build(tiny), tiny, cfg=1.0), tiny) > 1e-5


def test_the_ranks_prepare_text_once_they_have_the_model_and_before_the_run_begins(elsewhere, monkeypatch):
    from para_core.adapters import comfy_parallel

    done = elsewhere.group.calls
    monkeypatch.setattr(comfy_parallel, "make_room", lambda *args, **settings: done.append("make_room"))
    run(elsewhere(on("llm_adapter.out_proj", build(ANIMA))), ANIMA)
    before = ["make_room", "configure", "load", "patch", "compute", "compute", "begin"]
    assert done[: len(before)] == before and set(done[len(before) :]) == {"forward", "end"}


def test_ranks_that_are_lost_while_they_prepare_text_begin_anew(elsewhere):
    from para_core.adapters.comfy_rank import Service

    group, model = elsewhere.group, on("llm_adapter.out_proj", build(ANIMA))
    expected = run(model, ANIMA)
    original, numbers = group.call, iter(range(1000))

    def dies(method, payload, **settings):
        if method in ("compute", "begin") and next(numbers) in (1, 2):  # the second text, and behind both
            group.service, group.call = Service(Context()), original
            group.recover()
            group.call = dies
        return original(method, payload, **settings)

    group.call = dies
    assert torch.equal(run(elsewhere(model), ANIMA), expected)
    assert group.calls.count("load") == 3 and group.calls.count("compute") == 2


@pytest.mark.parametrize("keep", [True, False])
def test_a_run_that_ends_before_its_first_call_leaves_the_devices_as_it_should(elsewhere, keep):
    from comfy.patcher_extension import WrappersMP

    model = elsewhere(build(ANIMA), keep_loaded=keep)
    unloaded = []
    elsewhere.group.service.unload = unloaded.append

    def fails(executor, *args, **kwargs):
        raise RuntimeError("before the ranks are asked")

    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "someone's", fails)
    with pytest.raises(RuntimeError, match="before the ranks"):
        run(model, ANIMA)
    assert "begin" not in elsewhere.group.calls and ("end" in elsewhere.group.calls) == (not keep)
    assert len(unloaded) == (not keep)
