"""Quantized text encoders of the real ComfyUI: T5 and CLIP-L side by side, as FLUX has them, but small."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import host_version

pytestmark = pytest.mark.usefixtures("comfy")

SMALL = {
    "t5xxl_model_config": {
        "d_ff": 128, "d_kv": 16, "d_model": 64, "num_heads": 4, "num_layers": 2, "num_decoder_layers": 2,
        "vocab_size": 100,
    },
    "clip_l_model_config": {
        "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2,
        "projection_dim": 64,
    },
}  # fmt: skip
TOKENS = {"l": [[(49406, 1.0), (320, 1.0), *[(49407, 1.0)] * 75]], "t5xxl": [[(5, 1.0), (9, 1.0), (1, 1.0)]]}
BLOCKS = 2 * 7 + 2 * 6  # T5: q k v o, gated in, out; CLIP-L: q k v out, in, out


def text_encoders(*state_dicts, **options):
    import comfy.sd
    from comfy.text_encoders.flux import FluxClipModel

    target = SimpleNamespace(params={}, clip=FluxClipModel, tokenizer=lambda **_: SimpleNamespace(state_dict=dict))
    options = {**SMALL, "dtype": torch.float32, **options}
    return comfy.sd.CLIP(target, state_dict=list(state_dicts), model_options=options)


@pytest.fixture
def clip():
    clip = text_encoders()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in clip.cond_stage_model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 and "embed" not in name else 1.0
        parameter.data.copy_(noise * scale)
    return clip


def encode(clip):
    cond, pooled = clip.encode_from_tokens(TOKENS, return_pooled=True)
    return torch.cat([cond.flatten(), pooled.flatten()])


def quantize(clip, scheme="int8_weight_only", include="", exclude=""):
    from para_core.adapters.comfy_quantization import apply_clip_quantization
    from para_core.quantization_plan import Selection

    return apply_clip_quantization(clip, scheme, Selection.of(include, exclude))


def add_lora(clip, strength=1.0):
    clone = clip.clone()
    generator = torch.Generator().manual_seed(1)
    patches = {
        name: ("diff", (torch.randn(weight.shape, generator=generator) * 0.02,))
        for name, weight in clip.cond_stage_model.state_dict().items()
        if name.endswith(".weight") and (".layer." in name or ".layers." in name) and weight.shape == (64, 64)
    }
    assert len(clone.add_patches(patches, strength)) == len(patches) > 0
    return clone


def relative(output, reference):
    return float((output - reference).norm() / reference.norm())


@pytest.mark.parametrize(("scheme", "error"), [("fp8_weight_only", 0.06), ("int8_weight_only", 0.02), ("auto", 0.02)])
def test_encoders_are_quantized_and_the_original_is_not(clip, scheme, error):
    expected = encode(clip)
    size = clip.patcher.model_size()
    quantized, report = quantize(clip, scheme)
    assert len(report.quantized) == BLOCKS
    output = encode(quantized)
    assert 1e-4 < relative(output, expected) < error
    assert torch.equal(encode(clip), expected)
    assert torch.equal(encode(quantized), output)
    assert quantized.patcher.model_size() == size - report.bytes_before + report.bytes_after
    assert quantized.patcher.loaded_size() == 0 or quantized.patcher.loaded_size() < size


def test_loras_work_in_front_and_behind(clip):
    expected = encode(clip)
    quantized, _ = quantize(clip)
    output = encode(quantized)
    behind = encode(add_lora(quantized))
    in_front = encode(quantize(add_lora(clip))[0])
    assert torch.equal(behind, in_front)
    assert relative(behind, encode(add_lora(clip))) < 1.3 * relative(output, expected)
    assert torch.equal(encode(quantized), output)


def test_dynamic_schemes_are_refused(clip):
    with pytest.raises(
        ValueError, match='^scheme "fp8_dynamic_per_row" is not available here; choose one of: auto, fp8_w'
    ):
        quantize(clip, "fp8_dynamic_per_row")


def test_one_encoder_can_be_left(clip):
    _, report = quantize(clip, exclude="clip_l.*")
    assert {name.split(".")[0] for name in report.quantized} == {"t5xxl"}
    assert "embed" not in " ".join(report.quantized)


def test_the_t5_that_the_host_saves_opens_in_the_host_as_quantized(clip):
    """Its own int8 product rounds the activations too, which is where the difference comes from."""
    if host_version()[:2] < (0, 33):
        pytest.skip("ComfyUI 0.3 reads other formats")
    import comfy.utils

    quantized, _ = quantize(clip)
    expected = quantized.encode_from_tokens(TOKENS)
    # As the node Save CLIP writes it, one file for each encoder.
    saved = {key: value for key, value in quantized.state_dict_for_saving().items() if key.startswith("t5xxl.")}
    saved = {key.removeprefix("t5xxl.transformer."): value for key, value in saved.items()}
    loaded = text_encoders(saved, t5xxl_quantization_metadata=comfy.utils.detect_layer_quantization(saved, ""))
    assert loaded.patcher.model_size() < clip.patcher.model_size()
    assert relative(loaded.encode_from_tokens(TOKENS), expected) < 0.06
