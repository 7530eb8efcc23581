"""Quantized models in the real ComfyUI's memory: counted, moved, offloaded, freed, and beside other models."""

import pytest
import torch
from adapters.quantization_cases import EACH_SCHEME, add_lora, call, quantize, relative, report_of
from tiny_models import FLUX, WAN, build, host_version

pytestmark = pytest.mark.usefixtures("comfy")


@EACH_SCHEME
def test_offloaded_layers_give_the_same(scheme):
    quantized = quantize(build(FLUX), scheme)
    output = call(quantized)
    assert torch.equal(call(quantized, unload=3_000_000), output)
    with_lora = add_lora(quantized)
    merged = call(with_lora)
    # There the host adds the LoRA to the dequantized weight at every step.
    assert relative(call(with_lora, unload=3_000_000), merged) < 1.5 * relative(output, call(build(FLUX)))
    assert torch.equal(call(quantized), output)


def test_freed_memory_is_loaded_again():
    import comfy.model_management

    quantized = quantize(build(FLUX))
    output = call(quantized)
    comfy.model_management.unload_all_models()
    assert quantized.loaded_size() == 0
    assert torch.equal(call(quantized), output)


@EACH_SCHEME
def test_host_counts_the_quantized_size(scheme):
    import comfy.model_management

    model = build(FLUX, dtype=torch.bfloat16)
    size = model.model_size()
    quantized, report = report_of(model, scheme)
    assert quantized.model_size() == size - report.bytes_before + report.bytes_after
    assert report.bytes_after <= 0.53 * report.bytes_before
    call(model)  # loaded now: the host must see that the clone is another one, or it moves and counts nothing
    call(quantized)
    # The host's own count of what stands in the model, the text that names the format aside.
    counted = comfy.model_management.module_size(quantized.model)
    assert counted == pytest.approx(quantized.model_size(), abs=128 * len(report.quantized))
    assert quantized.loaded_size() == quantized.model_size() < 0.67 * size
    assert add_lora(quantized).model_size() == quantized.model_size()
    assert model.model_size() == size


def test_host_moves_the_layers_with_the_model():
    quantized = quantize(build(FLUX))
    call(quantized)
    layer = quantized.object_patches["diffusion_model.single_blocks.0.linear1"]
    stored = layer.weight
    layer.to("meta")
    assert layer.weight.is_meta and layer.bias.is_meta and not stored.is_meta


def test_tensors_go_through_the_hosts_transfer_buffers():
    if host_version()[:2] < (0, 33):
        pytest.skip("ComfyUI 0.3 has no transfer buffers")
    import comfy.memory_management as memory

    layer = quantize(build(FLUX)).object_patches["diffusion_model.single_blocks.0.linear1"]
    buffer = torch.empty(memory.vram_aligned_size([layer.weight, layer.bias]), dtype=torch.uint8)
    weight, bias = memory.interpret_gathered_like([layer.weight, layer.bias], buffer)
    weight.copy_(layer.weight)
    bias.copy_(layer.bias)
    assert torch.equal(weight.dequantize(), layer.weight.dequantize()) and torch.equal(bias, layer.bias)


def test_two_quantized_models_of_one_original_take_turns():
    model = build(FLUX)
    one, two = quantize(model, "fp8_weight_only"), quantize(model, "int8_weight_only", exclude="double_blocks.0.*")
    first, second = call(one), call(two)
    assert not torch.equal(first, second)
    for _ in range(2):
        assert torch.equal(call(one), first)
        assert torch.equal(call(two), second)
    # Made while the other one is loaded.
    assert torch.equal(call(quantize(model, "fp8_weight_only")), first)
    assert torch.equal(call(model), call(build(FLUX)))


def test_a_second_model_in_the_graph_is_not_touched():
    other = build(WAN)
    expected = call(other, WAN)
    quantized = quantize(build(FLUX))
    output = call(quantized)
    assert torch.equal(call(other, WAN), expected)
    assert torch.equal(call(quantized), output)
