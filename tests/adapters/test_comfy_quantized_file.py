"""Quantized weights of the real ComfyUI in files, and on their way to other processes."""

import pytest
import torch
from adapters.quantization_cases import EACH_SCHEME, add_lora, call, quantize, relative, report_of
from tiny_models import FLUX, WAN, build, host_version

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.mark.parametrize("scheme", ["fp8_dynamic_per_tensor", "int8_weight_only"])
def test_saved_model_opens_in_the_hosts_own_loader(scheme, tmp_path):
    if host_version()[:2] < (0, 33):
        pytest.skip("ComfyUI 0.3 reads other formats")
    import comfy.sd

    quantized = quantize(build(FLUX, dtype=torch.bfloat16), scheme)
    output = call(quantized)
    comfy.sd.save_checkpoint(str(tmp_path / "model.safetensors"), quantized)
    loaded = comfy.sd.load_diffusion_model(str(tmp_path / "model.safetensors"))
    path = "diffusion_model.double_blocks.0.img_attn.qkv"
    weight = loaded.get_model_object(path).weight
    assert torch.equal(weight._qdata, quantized.object_patches[path].quantized_weight().data)
    assert relative(call(loaded), output) < 0.12


@pytest.mark.parametrize("scheme", ["fp8_dynamic_per_row", "int8_weight_only"])
def test_weights_come_back_from_a_file(scheme, tmp_path):
    from para_core.adapters.comfy_quantization import load_quantized_weights, save_quantized_weights

    file = str(tmp_path / "weights.safetensors")
    quantized, report = report_of(build(FLUX, dtype=torch.bfloat16), scheme)
    output = call(quantized)
    save_quantized_weights(add_lora(quantized), file)
    assert report.bytes_after < (tmp_path / "weights.safetensors").stat().st_size < 1.05 * report.bytes_after
    loaded = load_quantized_weights(build(FLUX, dtype=torch.bfloat16), file)
    assert torch.equal(call(loaded), output)
    assert torch.equal(call(add_lora(loaded)), call(add_lora(quantized)))
    with pytest.raises(ValueError, match="^the MODEL has no quantized layers to save; connect it from behind FP8"):
        save_quantized_weights(build(FLUX), file)


@EACH_SCHEME
def test_weights_travel_to_another_copy_of_the_model(scheme):
    from para_core.adapters.comfy_quantization import quantized_weights, with_quantized_weights
    from para_core.quantization import from_state_dict, to_state_dict

    quantized = quantize(build(FLUX), scheme)
    output = call(quantized)
    call(add_lora(quantized))  # merged now, and not to be sent
    weights = from_state_dict(*to_state_dict(quantized_weights(quantized)))
    assert len(weights) == 22
    received = with_quantized_weights(build(FLUX), weights)
    assert received.model_size() == quantized.model_size()
    assert torch.equal(call(received), output)


def test_weights_of_another_model_are_refused():
    from para_core.adapters.comfy_quantization import quantized_weights, with_quantized_weights

    weights = quantized_weights(quantize(build(FLUX)))
    with pytest.raises(
        ValueError, match="^the model has no layer double_blocks.0.img_attn.qkv; the quantized weights are"
    ):
        with_quantized_weights(build(WAN), weights)
    wrong = {"double_blocks.0.img_mlp.0": weights["double_blocks.0.img_attn.qkv"]}
    with pytest.raises(ValueError, match=r"^double_blocks.0.img_mlp.0 is \(1024, 256\) in this model and \(768, 256\)"):
        with_quantized_weights(build(FLUX), wrong)
