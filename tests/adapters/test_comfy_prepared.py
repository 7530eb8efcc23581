"""What the ranks have been asked to build, also where that was cancelled or failed half-way."""

import pytest
import torch
from fixtures_in_process import cancelled_once_asked
from tiny_models import FLUX, build, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")


def failing_on_the_rank(group, method):
    """The next call of the method raises there, after what it replaces is gone."""
    from para_core.adapters import comfy_rank_models
    from para_core.workers import WorkerError

    builder = {"quantize": "with_quantized", "patch": "with_patches", "load_vae": "from_module"}[method]
    original, make = group.call, getattr(comfy_rank_models, builder)

    def fails(*args):
        raise ModuleNotFoundError("no such adapter")

    def call(asked, payload, **settings):
        if asked != method:
            return original(asked, payload, **settings)
        setattr(comfy_rank_models, builder, fails)
        try:
            return original(asked, payload, **settings)
        except ModuleNotFoundError as error:
            raise WorkerError(str(error)) from error
        finally:
            setattr(comfy_rank_models, builder, make)
            group.call = original

    group.call = call
    return pytest.raises(WorkerError)


ENDS = pytest.mark.parametrize("ends", [cancelled_once_asked, failing_on_the_rank])


@ENDS
@pytest.mark.parametrize("before", [None, 0.5], ids=["plain", "lora"])
def test_a_variant_that_was_left_half_way(elsewhere, before, ends):
    """The ranks have dropped the one before by then; both it and the other can be asked for again."""
    model = build(FLUX)
    first = elsewhere(model if before is None else lora(model, before))
    other = elsewhere(lora(model, 1.0))
    expected = sample(first, FLUX)
    with ends(elsewhere.group, "patch"):
        sample(other, FLUX)
    assert torch.equal(sample(first, FLUX), expected)
    assert torch.equal(sample(other, FLUX), sample(lora(model, 1.0), FLUX))
    assert elsewhere.group.calls.count("load") == 1


@ENDS
def test_a_quantization_that_was_left_half_way(elsewhere, ends):
    from para_core.adapters.comfy_quantization import apply_quantization

    model = lora(build(FLUX), 0.5)
    quantized, _ = apply_quantization(model, "int8_weight_only")
    wired = [elsewhere(model), elsewhere(quantized)]
    expected = [sample(model, FLUX), sample(quantized, FLUX)]
    sample(wired[0], FLUX)
    with ends(elsewhere.group, "quantize"):
        sample(wired[1], FLUX)
    for one, result in zip(wired, expected, strict=True):
        assert torch.equal(sample(one, FLUX), result)


@ENDS
def test_a_vae_that_was_left_half_way(elsewhere, ends):
    """What the ranks have of a VAE is not what was asked for before."""
    from comfy.model_patcher import ModelPatcher

    prepared, service, cpu = elsewhere.group.recover.__self__.prepared, elsewhere.group.service, torch.device("cpu")
    first, other = (ModelPatcher(torch.nn.Linear(2, 2), load_device=cpu, offload_device=cpu) for _ in range(2))
    prepared.vae(first)
    with ends(elsewhere.group, "load_vae"):
        prepared.vae(other)
    for vae in (first, other):
        names = prepared.vae(vae)
        name, patcher = service._vae
        assert names == {"model": name}
        assert torch.equal(patcher.model.diffusion_model.weight, vae.model.weight)


def sent_to(group):
    """Collects what goes to the ranks from now on: (method, bytes of the message, bytes that all of them map)."""
    from para_core.workers.protocol import Message

    original, sent = group.call, []

    def call(method, payload, **settings):
        message = Message(payload)
        sent.append((method, message.size, sum(block.size for block in message.shared)))
        return original(method, payload, **settings)

    group.call = call
    return sent


def test_another_lora_brings_no_quantized_weights_again(elsewhere):
    """They go to the ranks once for a model, and for a quantization of it, all of it in memory that the ranks share."""
    from para_core.adapters.comfy_quantization import apply_quantization

    model, sent = build(FLUX), sent_to(elsewhere.group)
    quantized, report = apply_quantization(model, "int8_weight_only")
    other, _ = apply_quantization(model, "int8_weight_only")

    def prepares(wired) -> dict:
        sent.clear()
        sample(wired, FLUX, steps=1)
        assert all(size < 100_000 for method, size, _ in sent if method != "forward"), "weights in a message are copied"
        return {method: shared for method, _, shared in sent if method in ("load", "quantize", "patch")}

    first = prepares(elsewhere(lora(quantized, 0.7)))
    lora_bytes = first["patch"]
    assert first["quantize"] == pytest.approx(report.bytes_after, rel=0.05) and lora_bytes > 0
    assert prepares(elsewhere(lora(quantized, 0.6))) == {"patch": lora_bytes}
    assert prepares(elsewhere(quantized)) == {"patch": 0}
    assert prepares(elsewhere(other)) == {"quantize": first["quantize"], "patch": 0}
    assert prepares(elsewhere(model)) == {"quantize": 0, "patch": 0}
    assert prepares(elsewhere(lora(model, 0.6))) == {"patch": lora_bytes}


@pytest.mark.parametrize("method", ["load", "quantize", "patch"])
def test_ranks_that_are_lost_while_they_build_a_model(elsewhere, method):
    """They come back with what they had before, and are asked once more for what they were doing."""
    from fixtures_in_process import Context

    from para_core.adapters.comfy_quantization import apply_quantization
    from para_core.adapters.comfy_rank import Service

    group, model = elsewhere.group, build(FLUX)
    quantized, _ = apply_quantization(lora(model, 0.5), "int8_weight_only")
    expected = sample(quantized, FLUX)
    sample(elsewhere(build(FLUX, seed=1) if method == "load" else model), FLUX, steps=1)
    original = group.call

    def call(asked, payload, **settings):
        if asked == method and group.call is call:
            group.service, group.call = Service(Context()), original
            group.recover()
        return original(asked, payload, **settings)

    group.call = call
    assert torch.equal(sample(elsewhere(quantized), FLUX), expected)
    assert torch.equal(sample(elsewhere(model), FLUX), sample(model, FLUX))
