"""Quantized linears in the real ComfyUI: LoRAs, offloading, other clones, files and the cache work as without them."""

import pytest
import torch
from tiny_models import FLUX, NEVER, TINY_MODELS, WAN, build, fbcache, host_version, sample, with_sampler

pytestmark = pytest.mark.usefixtures("comfy")

# Importing bitsandbytes takes seconds; nf4 has its own tests.
SCHEMES = (
    "fp8_dynamic_per_tensor", "fp8_dynamic_per_row", "fp8_weight_only", "int8_dynamic_per_row", "int8_weight_only",
)  # fmt: skip
EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
CPU = torch.device("cpu")


def quantize(patcher, scheme="fp8_dynamic_per_row", **patterns):
    return report_of(patcher, scheme, **patterns)[0]


def report_of(patcher, scheme="fp8_dynamic_per_row", include="", exclude=""):
    from para_core.adapters.comfy_quantization import apply_quantization
    from para_core.quantization_plan import Selection

    return apply_quantization(patcher, scheme, Selection.of(include, exclude))


def call(patcher, tiny=FLUX, *, unload=0):
    """What the model gives for one step. unload: bytes to move away when it is loaded."""
    outputs = []

    def once(model, x, sigmas):
        if unload:
            patcher.partially_unload(CPU, unload)
            assert patcher.model.model_lowvram
        outputs.append(model(x, sigmas[1]).clone())

    with_sampler(patcher, tiny, once)
    return outputs[0]


def add_lora(patcher, strength=1.0, size=0.03, tiny=FLUX):
    """A rank-4 LoRA on every linear of the blocks, as the LoRA nodes leave it on a clone."""
    import comfy.weight_adapter

    clone = patcher.clone()
    generator = torch.Generator().manual_seed(3)
    patches = {}
    for name, weight in build(tiny).model.state_dict().items():
        if "block" in name and weight.ndim == 2:
            up = torch.randn(weight.shape[0], 4, generator=generator) * size
            down = torch.randn(4, weight.shape[1], generator=generator) * size
            patches[name] = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 4.0, None, None, None))
    assert len(clone.add_patches(patches, strength)) == len(patches)
    return clone


def relative(output, reference):
    return float((output.float() - reference.float()).norm() / reference.float().norm())


def weights_of(patcher):
    """Copies of all weights of the unloaded model."""
    import comfy.model_management

    comfy.model_management.unload_all_models()
    return {name: tensor.clone() for name, tensor in patcher.model.state_dict().items()}


@pytest.fixture(scope="module")
def exact(comfy):
    """One call of the unquantized FLUX."""
    with torch.inference_mode():
        return call(build(FLUX))


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


def test_weights_are_taken_without_the_lora_that_is_merged_at_that_time(exact):
    model = build(FLUX)
    call(add_lora(model))
    assert torch.equal(call(quantize(model)), call(quantize(build(FLUX))))


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

    from para_core.quantization import SCHEMES
    from para_core.quantization import quantize as quantize_weight

    path = "diffusion_model.double_blocks.0.img_attn.qkv"
    model = build(FLUX)
    merged = add_lora(model, size=0.01)
    call(merged)
    expected = quantize_weight(comfy.utils.get_attr(merged.model, f"{path}.weight"), SCHEMES[scheme])
    quantized = add_lora(quantize(model, scheme), size=0.01)
    call(quantized)
    assert torch.equal(quantized.object_patches[path].quantized_weight().data, expected.data)


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
    # The host's own count of what stands in the model, the few bytes that name the format aside.
    counted = comfy.model_management.module_size(quantized.model)
    assert counted == pytest.approx(quantized.model_size(), abs=64 * len(report.quantized))
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


def test_two_quantized_models_of_one_original_take_turns(exact):
    model = build(FLUX)
    one, two = quantize(model, "fp8_weight_only"), quantize(model, "int8_weight_only", exclude="double_blocks.0.*")
    first, second = call(one), call(two)
    assert not torch.equal(first, second)
    for _ in range(2):
        assert torch.equal(call(one), first)
        assert torch.equal(call(two), second)
    # Made while the other one is loaded.
    assert torch.equal(call(quantize(model, "fp8_weight_only")), first)
    assert torch.equal(call(model), exact)


def test_a_second_model_in_the_graph_is_not_touched():
    other = build(WAN)
    expected = call(other, WAN)
    quantized = quantize(build(FLUX))
    output = call(quantized)
    assert torch.equal(call(other, WAN), expected)
    assert torch.equal(call(quantized), output)


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
