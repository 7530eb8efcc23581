"""Quantized linears in the real ComfyUI: which layers, how exact, and what other nodes and packs see of it."""

import pytest
import torch
from adapters.quantization_cases import EACH_SCHEME, add_lora, call, quantize, relative, report_of
from tiny_models import FLUX, NEVER, TINY_MODELS, build, fbcache, host_version, sample

pytestmark = pytest.mark.usefixtures("comfy")


@pytest.fixture(scope="module")
def exact(comfy):
    """One call of the unquantized FLUX."""
    with torch.inference_mode():
        return call(build(FLUX))


def weights_of(patcher):
    """Copies of all weights of the unloaded model."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    return {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}


@EACH_SCHEME
def test_quantized_model_is_close_and_repeats(scheme, exact):
    quantized, report = report_of(build(FLUX), scheme)
    output = call(quantized)
    # About twice the error of one product: activations pass through ten layers whose errors partly cancel.
    assert 1e-4 < relative(output, exact) < (0.12 if "fp8" in scheme else 0.04)
    assert torch.equal(call(quantized), output)
    assert len(report.quantized) == 22
    assert report.left["double_blocks.0.img_mod.lin"] == "modulation, norms, embedders"
    assert report.left["final_layer.linear"] == "outside the blocks"


@EACH_SCHEME
def test_upstream_model_and_its_clones_stay_bit_equal(scheme, exact):
    model = build(FLUX)
    clone = add_lora(model, 0.5)
    with_lora = call(clone)
    before = weights_of(model)
    quantized = quantize(model, scheme)
    output = call(quantized)
    assert torch.equal(call(model), exact)
    assert torch.equal(call(clone), with_lora)
    assert torch.equal(call(quantized), output)
    after = weights_of(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_second_node_takes_only_what_the_first_left():
    quantized, _ = report_of(build(FLUX), "int8_weight_only", exclude="single_blocks.*")
    both, report = report_of(quantized, "fp8_weight_only")
    assert report.quantized == tuple(f"single_blocks.{i}.linear{k}" for i in range(3) for k in (1, 2))
    assert report.left["double_blocks.0.img_mlp.0"] == "already quantized (by this node)"
    schemes = {path: layer.scheme.name for path, layer in both.object_patches.items()}
    assert schemes["diffusion_model.double_blocks.0.img_mlp.0"] == "int8_weight_only"
    assert call(both).isfinite().all()
    with pytest.raises(ValueError, match="^no layer to quantize: 22 already quantized .by this node."):
        report_of(both)


def test_weights_in_float8_are_left():
    model = build(FLUX)
    for block in model.model.diffusion_model.single_blocks:
        block.linear1.weight.data = block.linear1.weight.data.to(torch.float8_e4m3fn)
    _, report = report_of(model)
    assert report.left["single_blocks.0.linear1"] == "already quantized (float8_e4m3fn)"


@pytest.mark.parametrize("stored", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"])
def test_the_hosts_own_quantized_layers_are_passed_through(stored, exact):
    """In the linear that the host's loader makes for a quantized checkpoint."""
    if host_version()[:2] < (0, 33):
        pytest.skip("ComfyUI 0.3 has no quantized tensors")
    import comfy.ops
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    layout = QUANT_ALGOS[stored]["comfy_tensor_layout"]
    model = build(FLUX)
    block = model.model.diffusion_model.single_blocks[0]
    theirs = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32, full_precision_mm=True).Linear(256, 1792)
    theirs.bias, theirs.quant_format, theirs.layout_type = block.linear1.bias, stored, layout
    weight = QuantizedTensor.from_float(block.linear1.weight.data, layout, scale="recalculate")
    theirs.weight = torch.nn.Parameter(weight, False)
    block.linear1 = theirs
    quantized, report = report_of(model, "int8_weight_only")
    assert report.left["single_blocks.0.linear1"] == f"already quantized ({layout})"
    assert f"1 already quantized ({layout})" in report.summary() and "single_blocks.0.linear1" in report.text()
    assert len(report.quantized) == 21
    output = call(quantized)
    assert quantized.model.diffusion_model.single_blocks[0].linear1 is theirs
    assert relative(output, exact) < 0.15


def test_layers_of_other_packs_are_left(exact):
    """As GGUF packs do it: a linear of their own that unpacks a tensor of their own."""

    class GGMLTensor(torch.Tensor):
        pass

    class GGMLLinear(torch.nn.Linear):
        def forward(self, x):
            weight = self.weight.as_subclass(torch.Tensor).float() / 100
            return torch.nn.functional.linear(x, weight, self.bias)

    class Special(torch.nn.Linear):
        pass

    model = build(FLUX)
    first, second, _ = model.model.diffusion_model.single_blocks
    theirs = GGMLLinear(256, 1792)
    theirs.bias = first.linear1.bias
    packed = (first.linear1.weight.data * 100).round().to(torch.int8).as_subclass(GGMLTensor)
    theirs.weight = torch.nn.Parameter(packed, requires_grad=False)
    first.linear1 = theirs
    special = Special(256, 1792)
    special.weight, special.bias = second.linear1.weight, second.linear1.bias
    second.linear1 = special
    quantized, report = report_of(model, "int8_weight_only")
    assert report.left["single_blocks.0.linear1"] == "already quantized (GGMLTensor)"
    assert report.left["single_blocks.1.linear1"] == "not a plain linear (Special)"
    assert relative(call(quantized), exact) < 0.15
    assert first.linear1 is theirs and second.linear1 is special


def test_patterns_choose_layers():
    _, report = report_of(build(FLUX), include="final_layer.linear, img_in", exclude="double_blocks.*")
    assert "final_layer.linear" in report.quantized and "img_in" in report.quantized
    assert len(report.quantized) == 8


@EACH_SCHEME
def test_order_with_the_cache_does_not_matter(scheme):
    always = 100.0  # random weights change far more from step to step than trained ones do
    one, two = [], []
    first = sample(fbcache(quantize(build(FLUX), scheme), always, one.append), FLUX)
    second = sample(quantize(fbcache(build(FLUX), always, two.append), scheme), FLUX)
    assert torch.equal(first, second)
    assert one[-1].num_reused_calls == two[-1].num_reused_calls > 0
    assert torch.equal(
        sample(fbcache(quantize(build(FLUX), scheme), NEVER), FLUX), sample(quantize(build(FLUX), scheme), FLUX)
    )


@pytest.mark.parametrize(("scheme", "shifts"), [("fp8_dynamic_per_tensor", True), ("int8_weight_only", False)])
@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_default_threshold_is_larger_where_activations_are_rounded_in_any_order(scheme, shifts, decision):
    def thresholds(threshold=None):
        found = []
        cached = fbcache(build(FLUX), threshold, found.append, decision=decision)
        in_front, behind = fbcache(quantize(build(FLUX), scheme), threshold, found.append, decision=decision), None
        behind = quantize(cached, scheme)
        for patcher in (cached, in_front, behind):
            sample(patcher, FLUX, steps=2)
        finished = [report.residual_diff_threshold for report in found if report.finished]
        assert len(finished) == 3
        return finished

    plain, in_front, behind = thresholds()
    assert in_front == behind
    share = 1 if decision == "first_block" else 0.5
    assert plain == pytest.approx(0.1 * share)
    assert in_front == pytest.approx((0.1345 if shifts else 0.1) * share, abs=1e-4)
    assert thresholds(0.08) == [0.08] * 3, "what the user asks for stays"


def test_nf4_quarters_the_memory_and_keeps_loras():
    pytest.importorskip("bitsandbytes")
    if host_version()[:2] < (0, 33):
        with pytest.raises(ValueError, match="^nf4 needs ComfyUI 0.33 or newer"):
            quantize(build(FLUX), "nf4")
        return
    model = build(FLUX, dtype=torch.bfloat16)
    quantized, report = report_of(model, "nf4")
    assert report.bytes_after <= 0.29 * report.bytes_before
    output = call(quantized)
    assert relative(output, call(model)) < 0.3
    merged = call(add_lora(quantized))
    assert relative(merged, call(add_lora(model))) < 1.5 * relative(output, call(model))
    assert torch.equal(call(quantize(add_lora(model), "nf4")), merged)
    assert torch.equal(call(quantized), output)
    assert torch.equal(call(quantized, unload=1_000_000), output)


def test_a_model_without_family_needs_patterns():
    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64)])

    model = build(FLUX)
    model.model.diffusion_model = Unknown()
    with pytest.raises(ValueError, match="^Unknown is not a model that Para Accelerate knows"):
        report_of(model)
    _, report = report_of(model, include="layers.*")
    assert report.quantized == ("layers.0",)


@pytest.mark.parametrize("tiny", TINY_MODELS.values(), ids=TINY_MODELS)
def test_every_family_is_quantized_in_its_blocks(tiny):
    model = build(tiny)
    quantized, report = report_of(model, "int8_weight_only")
    assert report.quantized
    assert not [name for name in report.quantized if "mod" in name.lower() or "norm" in name or "embed" in name]
    expected = sample(model, tiny, steps=1)
    output = sample(quantized, tiny, steps=1)
    assert not torch.equal(output, expected)
    assert relative(output, expected) < 0.1
