"""quantize_pipe on a small FLUX pipeline: what is exchanged, how close it stays, and what is refused."""

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

from para_core.adapters.diffusers import apply_cache_on_pipe  # noqa: E402
from para_core.adapters.diffusers_quantization import QuantizedLinear, quantize_model, quantize_pipe  # noqa: E402
from para_core.quantization_plan import Selection  # noqa: E402


@pytest.fixture
def pipe():
    torch.manual_seed(0)
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=32, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(8, 12, 12),
    )  # fmt: skip
    for parameter in transformer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    parts = {"vae": None, "text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    return diffusers.FluxPipeline(scheduler=scheduler, transformer=transformer.eval(), **parts)


def run(pipe, steps=2):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    dtype = pipe.transformer.x_embedder.weight.dtype
    return pipe(
        prompt_embeds=torch.randn(1, 5, 32, generator=generator).to(dtype),
        pooled_prompt_embeds=torch.randn(1, 32, generator=generator).to(dtype),
        height=80,
        width=112,
        latents=torch.randn(1, 35, 16, generator=generator).to(dtype),
        num_inference_steps=steps,
        output_type="latent",
    ).images.float()


def relative(output, reference):
    return float((output - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    ("scheme", "error"), [("fp8_dynamic_per_row", 0.15), ("int8_weight_only", 0.04), ("auto", 0.04)]
)
def test_pipe_is_quantized_in_its_blocks(pipe, scheme, error):
    expected = run(pipe)
    assert quantize_pipe(pipe, scheme) is pipe
    names = [name for name, layer in pipe.transformer.named_modules() if isinstance(layer, QuantizedLinear)]
    assert "transformer_blocks.0.attn.to_q" in names and "single_transformer_blocks.1.proj_out" in names
    assert not [name for name in names if "norm" in name or "embed" in name]
    assert 1e-4 < relative(run(pipe), expected) < error


def test_cache_and_quantization_go_together_in_any_order(pipe):
    state = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    cached = apply_cache_on_pipe(quantize_pipe(pipe, "int8_weight_only"), residual_diff_threshold=100.0)
    first = run(cached, steps=4)
    other = diffusers.FluxPipeline(**pipe.components)
    other.transformer = diffusers.FluxTransformer2DModel.from_config(pipe.transformer.config).eval()
    other.transformer.load_state_dict(state)
    quantize_pipe(apply_cache_on_pipe(other, residual_diff_threshold=100.0), "int8_weight_only")
    assert torch.equal(run(other, steps=4), first)


def test_default_threshold_is_larger_on_a_quantized_pipe_in_any_order(pipe):
    reports = []
    run(apply_cache_on_pipe(pipe, listener=reports.append))
    run(quantize_pipe(pipe, "fp8_dynamic_per_row"))
    run(apply_cache_on_pipe(pipe, listener=reports.append))
    assert [report.residual_diff_threshold for report in reports] == pytest.approx([0.1, 0.1345, 0.1345], abs=1e-4)


def test_quantized_weights_keep_their_dtype_when_the_pipe_is_cast(pipe):
    quantize_pipe(pipe, "fp8_weight_only")
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    before = layer.weight.clone()
    expected = run(pipe)
    pipe.to(torch.bfloat16)
    assert layer.weight.dtype == torch.float8_e4m3fn and layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.weight.view(torch.uint8), before.view(torch.uint8))
    assert layer.bias.dtype == torch.bfloat16
    assert relative(run(pipe), expected) < 0.1


def test_state_dict_is_flat_and_loads_back(pipe):
    quantize_pipe(pipe, "fp8_dynamic_per_tensor")
    state = {name: tensor.clone() for name, tensor in pipe.transformer.state_dict().items()}
    assert state["transformer_blocks.0.attn.to_q.weight"].dtype == torch.float8_e4m3fn
    expected = run(pipe)
    for layer in pipe.transformer.modules():
        if isinstance(layer, QuantizedLinear):
            layer.weight_scale.zero_()
    assert not torch.equal(run(pipe), expected)
    pipe.transformer.load_state_dict(state)
    assert torch.equal(run(pipe), expected)


def test_components_and_patterns_are_checked(pipe):
    with pytest.raises(ValueError, match="^FluxPipeline has no model unet; it has: transformer"):
        quantize_pipe(pipe, components=("unet",))
    with pytest.raises(ValueError, match='^pattern "to_q" matches no linear layer'):
        quantize_pipe(pipe, selection=Selection.of("", "to_q"))


def test_a_model_without_family_is_quantized_weight_only():
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
    report = quantize_model(model)
    assert report.scheme == "int8_weight_only" and report.quantized == ("0",)
    with pytest.raises(ValueError, match="^no layer to quantize: 1 already quantized .by this function."):
        quantize_model(model)
    with pytest.raises(ValueError, match='^scheme "fp8_dynamic_per_row" is not available here'):
        quantize_model(torch.nn.Sequential(torch.nn.Linear(64, 64)), "fp8_dynamic_per_row")
