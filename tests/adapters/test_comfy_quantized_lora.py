"""LoRAs on quantized models in the real ComfyUI: added to the original weights, changed, removed, refused."""

import pytest
import torch
from adapters.quantization_cases import EACH_SCHEME, add_lora, call, quantize, relative
from tiny_models import FLUX, build, host_version

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@EACH_SCHEME
def test_lora_on_quantized_is_within_the_schemes_error(scheme, dtype):
    model = build(FLUX, dtype=dtype)
    plain, with_lora = call(model), call(add_lora(model))
    quantized = quantize(model, scheme)
    output = call(quantized)
    own_error = relative(output, plain)
    merged = call(add_lora(quantized))
    # The error is that of other roundings of as many weights, so of equal size; a lost LoRA would be 0.06 off.
    assert relative(merged, with_lora) < 1.3 * own_error
    assert relative(merged - output, with_lora - plain) < 0.9 if "int8" in scheme else True


@EACH_SCHEME
def test_lora_in_front_behind_changed_and_removed(scheme):
    model = build(FLUX)
    quantized = quantize(model, scheme)
    without = call(quantized)
    behind = call(add_lora(quantized))
    assert torch.equal(call(quantize(add_lora(model), scheme)), behind)
    weaker = call(add_lora(quantized, 0.5))
    assert not torch.equal(weaker, behind) and not torch.equal(weaker, without)
    assert torch.equal(call(add_lora(quantized, 0.5)), weaker)
    assert torch.equal(call(quantized), without)
    assert torch.equal(call(add_lora(quantized)), behind)


@EACH_SCHEME
def test_lora_is_rounded_once(scheme):
    """Added to the weight before it was quantized; twice rounded, half of a small LoRA would be lost."""
    import comfy.utils

    from para_core.quantization import quantize as quantize_weight
    from para_core.quantization_scheme import SCHEMES

    path = "diffusion_model.double_blocks.0.img_attn.qkv"
    model = build(FLUX)
    merged = add_lora(model, size=0.01)
    call(merged)
    expected = quantize_weight(comfy.utils.get_attr(merged.model, f"{path}.weight"), SCHEMES[scheme])
    quantized = add_lora(quantize(model, scheme), size=0.01)
    call(quantized)
    assert torch.equal(quantized.object_patches[path].quantized_weight().data, expected.data)


def test_weights_are_taken_without_the_lora_that_is_merged_at_that_time():
    model = build(FLUX)
    call(add_lora(model))
    assert torch.equal(call(quantize(model)), call(quantize(build(FLUX))))


def test_lora_hooks_are_refused_by_name():
    layer = quantize(build(FLUX)).object_patches["diffusion_model.single_blocks.0.linear1"]
    with pytest.raises(ValueError, match="^a LoRA hook .* cannot change a quantized weight while sampling; use Load"):
        layer.set_weight(torch.zeros(1792, 256), inplace_update=True)


def test_what_the_host_does_with_a_lora_under_dynamic_vram():
    """There it asks the tensor itself: dequantize, add, quantize again with stochastic rounding, write in place."""
    if host_version()[:2] < (0, 33):
        pytest.skip("ComfyUI 0.3 has no dynamic VRAM")
    weight = quantize(build(FLUX), "fp8_weight_only").object_patches["diffusion_model.single_blocks.0.linear1"].weight
    before = weight.to(dtype=torch.float32).dequantize()
    merged = weight.requantize_from_float(before + 1e-4, scale="recalculate", stochastic_rounding=7)
    # A hundredth of a rounding step: of a single weight it is lost or it is a whole step, but on average it is there.
    assert 0.9e-4 < float((merged.dequantize() - before).mean()) < 1.1e-4
    kept = weight.clone()
    kept.copy_(merged)
    assert torch.equal(kept.dequantize(), merged.dequantize())
