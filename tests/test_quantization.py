"""Scales, rounding and products against torchao and against plain float64; what a device cannot run; files."""

import pytest
import torch

from para_core.quantization import (
    choose_scale,
    from_state_dict,
    kernel_linear,
    quantize,
    reference_linear,
    to_state_dict,
)
from para_core.quantization_scheme import SCHEMES

CPU = torch.device("cpu")
# Relative L2 of one product with normally distributed weights and activations: 3 bits of mantissa round by 2.6 %,
# 8 bits up to 4 standard deviations by 0.9 %, twice where both sides are rounded; 4 bits by 9 %.
ERRORS = {
    "fp8_dynamic_per_tensor": 0.04,
    "fp8_dynamic_per_row": 0.04,
    "fp8_weight_only": 0.028,
    "int8_dynamic_per_row": 0.013,
    "int8_weight_only": 0.01,
    "nf4": 0.12,
}
WITHOUT_NF4 = [name for name in SCHEMES if name != "nf4"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def tensors(dtype=torch.float32):
    """(weight, bias, activation) whose rows differ a lot in size."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 256, generator=generator) * 0.02 * torch.rand(96, 1, generator=generator)
    x = torch.randn(3, 7, 256, generator=generator) * 10 ** torch.randn(3, 7, 1, generator=generator)
    return weight.to(dtype), torch.randn(96, generator=generator).to(dtype), x.to(dtype)


def relative(output, reference):
    return float((output.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("name", SCHEMES)
def test_product_is_within_the_schemes_error(name):
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    weight, bias, x = tensors()
    output = quantize(weight, SCHEMES[name]).linear(x, bias)
    assert output.shape == (3, 7, 96) and output.dtype == x.dtype
    assert relative(output - bias, x.double() @ weight.double().t()) < ERRORS[name]


@DTYPES
@pytest.mark.parametrize("name", WITHOUT_NF4)
def test_scales_and_rounding_are_torchaos(name, dtype):
    ao = pytest.importorskip("torchao.quantization")
    weight, _, _ = tensors(dtype)
    ours, scheme = quantize(weight, SCHEMES[name]), SCHEMES[name]
    granularity = ao.PerRow() if scheme.per_row else ao.PerTensor()
    theirs = {"fp8": ao.Float8Tensor, "int8": ao.Int8Tensor}[scheme.kind].from_hp(weight, granularity=granularity)
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.data.view(torch.uint8), theirs.qdata.view(torch.uint8))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp8_dynamic_per_tensor", torch.float32),
        ("fp8_dynamic_per_tensor", torch.bfloat16),
        ("fp8_dynamic_per_row", torch.bfloat16),
    ],
)
def test_reference_equals_torchaos_dynamic_fp8(name, dtype, monkeypatch):
    """torchao quantizes and multiplies a layer on its own; only its question for the hardware is answered for it."""
    ao = pytest.importorskip("torchao.quantization")
    monkeypatch.setattr("torchao.quantization.quant_api._check_hardware_support", lambda granularity: None)
    weight, bias, x = tensors(dtype)
    layer = torch.nn.Linear(256, 96, dtype=dtype)
    layer.weight.data, layer.bias.data = weight.clone(), bias.clone()
    granularity = ao.PerRow() if SCHEMES[name].per_row else ao.PerTensor()
    ao.quantize_(layer, ao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity))
    assert type(layer.weight).__name__ == "Float8Tensor", "torchao has quietly left the layer as it was"
    with torch.no_grad():
        expected = layer(x)
    assert relative(reference_linear(quantize(weight, SCHEMES[name]), x, bias), expected) <= 1e-6


@DTYPES
@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.dynamic])
def test_kernel_path_gives_the_references_numbers(name, dtype):
    """torchao's tensors run on the CPU too, so what GPUs will run is tried here."""
    pytest.importorskip("torchao")
    weight, bias, x = tensors(dtype)
    quantized = quantize(weight, SCHEMES[name])
    output = kernel_linear(quantized, x, bias)
    assert output.dtype == dtype
    if name == "fp8_dynamic_per_row":
        x, bias = x.bfloat16(), bias.bfloat16()
    # torchao rounds int8's to bf16 twice, half a unit in the last of 8 bits each time.
    assert relative(output, reference_linear(quantized, x, bias)) < 4e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("linear", [reference_linear, kernel_linear])
def test_part_of_an_activation_is_scaled_as_the_whole(linear, dtype):
    """As a rank has it; only sums may be in another order, and are then rounded to the dtype."""
    if linear is kernel_linear:
        pytest.importorskip("torchao")
    weight, bias, x = tensors(dtype)
    quantized, largest = quantize(weight, SCHEMES["fp8_dynamic_per_tensor"]), x.float().abs().amax()
    whole = linear(quantized, x, bias)
    rows = [row for row in range(3) if x[row].abs().max() < largest]
    assert len(rows) == 2
    for row in rows:
        part = linear(quantized, x[row], bias, largest)
        assert part.dtype == dtype
        assert relative(part, whole[row]) <= 2 * torch.finfo(dtype).eps
        assert relative(linear(quantized, x[row], bias), whole[row]) > 1e-2, "its own scale would do too"


def test_per_row_is_no_worse_than_per_tensor_and_far_better_on_small_rows():
    weight, _, x = tensors()
    x[0] *= 1e-6  # below what one scale for all tokens leaves of them
    exact = torch.nn.functional.linear(x, weight)
    errors = {}
    for name in ("fp8_dynamic_per_row", "fp8_dynamic_per_tensor"):
        output = quantize(weight, SCHEMES[name]).linear(x)
        assert output.isfinite().all()
        per_token = (output - exact).norm(dim=-1) / exact.norm(dim=-1)
        errors[name] = float(per_token.mean()), float(per_token.max())
    row, tensor = errors["fp8_dynamic_per_row"], errors["fp8_dynamic_per_tensor"]
    assert row[0] <= tensor[0] and row[1] < 0.5 * tensor[1]


def test_activation_scale_is_computed_at_run_time():
    """A static scale of 1 would saturate at 448."""
    weight, _, x = tensors()
    for name in ("fp8_dynamic_per_tensor", "fp8_dynamic_per_row", "int8_dynamic_per_row"):
        quantized = quantize(weight, SCHEMES[name])
        assert relative(quantized.linear(x * 2**20), quantized.linear(x) * 2**20) < 1e-6


@DTYPES
@pytest.mark.parametrize("name", WITHOUT_NF4)
def test_rows_of_zeros_stay_zero(name, dtype):
    weight, _, x = tensors(dtype)
    weight[3] = 0
    x[1] = 0
    output = quantize(weight, SCHEMES[name]).linear(x)
    assert output.isfinite().all()
    assert (output[1] == 0).all() and (output[..., 3] == 0).all()


@pytest.mark.parametrize("name", WITHOUT_NF4)
def test_a_stream_without_tokens_stays_empty(name):
    weight, bias, x = tensors()
    assert quantize(weight, SCHEMES[name]).linear(x[:, :0], bias).shape == (3, 0, 96)


def test_float16_of_small_numbers_does_not_underflow():
    weight = torch.full((64, 64), 1e-6, dtype=torch.float16)
    for name in WITHOUT_NF4:
        assert (choose_scale(weight, SCHEMES[name]) > 0).all()
        assert quantize(weight, SCHEMES[name]).dequantize(torch.float32).isfinite().all()


@pytest.mark.parametrize("name", SCHEMES)
def test_memory_is_half_of_bf16_or_less(name):
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    weight = torch.randn(512, 512, dtype=torch.bfloat16)
    assert quantize(weight, SCHEMES[name]).nbytes <= (0.29 if name == "nf4" else 0.51) * weight.nbytes


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_survive_a_safetensors_file(name, tmp_path):
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    safetensors = pytest.importorskip("safetensors")
    save_file = pytest.importorskip("safetensors.torch").save_file
    weight, _, x = tensors()
    saved = {"blocks.0.a": quantize(weight, SCHEMES[name]), "blocks.1.b": quantize(weight * 3, SCHEMES[name])}
    flat, metadata = to_state_dict(saved)
    save_file(flat, tmp_path / "weights.safetensors", metadata)
    with safetensors.safe_open(tmp_path / "weights.safetensors", "pt") as file:
        loaded = from_state_dict({key: file.get_tensor(key) for key in file.keys()}, file.metadata())
    assert loaded.keys() == saved.keys()
    for layer in saved:
        assert loaded[layer].scheme == SCHEMES[name] and loaded[layer].shape == (96, 256)
        assert torch.equal(loaded[layer].linear(x), saved[layer].linear(x))


def test_a_foreign_file_is_refused():
    with pytest.raises(ValueError, match="carries no para_quantization metadata"):
        from_state_dict({}, {"format": "pt"})


def test_int8_product_of_half_precision_does_not_overflow():
    """Its whole numbers exceed float16's largest value before the weight's scales bring them back."""
    pytest.importorskip("torchao", reason="torchao is not installed: pip install torchao")
    torch.manual_seed(0)
    weight, x = torch.randn(64, 4096) * 0.02, torch.randn(8, 4096)
    x[:, 7], weight[3, 7] = 600.0, 0.08
    quantized = quantize(weight.half(), SCHEMES["int8_dynamic_per_row"])
    output, expected = (call(quantized, x.half(), None) for call in (kernel_linear, reference_linear))
    assert output.isfinite().all() and relative(output.float(), expected.float()) < 1e-3
