"""Models that the real ComfyUI has saved behind FP8 Quantize, loaded again: the same, and small from the start."""

import json

import pytest
import torch
from adapters.quantization_cases import EACH_SCHEME, add_lora, call, quantize, relative, report_of
from tiny_models import FLUX, build, fbcache, host_version, sample

pytestmark = pytest.mark.usefixtures("comfy")


def save(patcher, folder):
    """As the host's node Save Model does; the file's name."""
    import comfy.sd

    file = str(folder / "model.safetensors")
    comfy.sd.save_checkpoint(file, patcher)
    return file


def load(file):
    from para_core.adapters.comfy_quantized_model import load_quantized_model

    return load_quantized_model(file)


@pytest.fixture(autouse=True)
def known(comfy, monkeypatch):
    """ComfyUI 0.3 takes the file of every FLUX for one of 3072 features; told otherwise, it loads it like any other."""
    if host_version()[:2] < (0, 33):
        import comfy.model_detection

        monkeypatch.setattr(comfy.model_detection, "detect_unet_config", lambda *_, **__: dict(FLUX.unet_config))


@pytest.fixture(scope="module")
def row(comfy, tmp_path_factory):
    """(a model quantized per row, its file)"""
    with torch.inference_mode():
        quantized = quantize(build(FLUX))
        return quantized, save(quantized, tmp_path_factory.mktemp("row"))


@EACH_SCHEME
def test_loaded_model_is_the_one_that_was_saved(scheme, tmp_path):
    quantized, report = report_of(build(FLUX), scheme)
    output = call(quantized)
    loaded = load(save(quantized, tmp_path))
    assert torch.equal(call(loaded), output)
    again = load(save(loaded, tmp_path))
    assert torch.equal(call(again), output)
    told = again.get_attachment("para_accelerate_quantization")[0]
    assert (told.scheme, told.bytes_before, told.bytes_after) == (scheme, report.bytes_before, report.bytes_after)
    assert set(told.quantized) == set(report.quantized) and "weight error unknown" in told.summary()


def test_nf4_comes_back_too(tmp_path):
    pytest.importorskip("bitsandbytes")
    if host_version()[:2] < (0, 33):
        pytest.skip("ComfyUI 0.3 does not hold nf4")
    quantized = quantize(build(FLUX), "nf4")
    loaded = load(save(quantized, tmp_path))
    assert torch.equal(call(loaded), call(quantized))
    assert torch.equal(call(loaded, unload=1_000_000), call(quantized))


def test_the_weights_are_never_in_memory_as_they_were(row, monkeypatch):
    import comfy.model_management

    from para_core.adapters import comfy_quantized_file, comfy_quantized_model

    made, held = [], []
    make = comfy_quantized_file.FileLinear.__init__
    put = comfy_quantized_model.comfy.utils.set_attr

    def making(layer, *args, **kwargs):
        make(layer, *args, **kwargs)
        made.append(layer.weight.is_meta)

    def putting(model, path, layer):
        held.append(sum(tensor.nbytes for tensor in model.state_dict().values() if not tensor.is_meta))
        return put(model, path, layer)

    monkeypatch.setattr(comfy_quantized_file.FileLinear, "__init__", making)
    monkeypatch.setattr(comfy_quantized_model.comfy.utils, "set_attr", putting)
    quantized, file = row
    loaded = load(file)
    assert len(made) > len(held) > 0 and all(made), "built without memory"
    assert max(held) < quantized.model_size()
    # The text that names the format aside.
    assert loaded.model_size() == pytest.approx(quantized.model_size(), abs=128 * len(held))
    call(loaded)
    assert comfy.model_management.module_size(loaded.model) == loaded.model_size()


def test_file_is_not_held_open_or_mapped(row, tmp_path):
    quantized, file = row
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(open(file, "rb").read())
    loaded = load(str(copy))
    with copy.open("r+b") as opened:
        opened.seek(100_000)  # behind the header
        opened.write(bytes(copy.stat().st_size - 100_000))
    assert torch.equal(call(loaded), call(quantized))


@EACH_SCHEME
def test_loras_work_as_on_a_quantized_model(scheme, tmp_path):
    model = build(FLUX)
    quantized = quantize(model, scheme)
    loaded = load(save(quantized, tmp_path))
    without = call(loaded)
    own_error = relative(without, call(model))
    merged = call(add_lora(loaded))
    # Rounded twice, since the original weights are gone: at most the root of two further off.
    assert relative(merged, call(add_lora(model))) < 1.3 * 2**0.5 * own_error
    assert not torch.equal(call(add_lora(loaded, 0.5)), merged)
    assert torch.equal(call(loaded), without), "removed"
    assert torch.equal(call(add_lora(loaded)), merged)


def test_a_lora_that_was_saved_is_in_the_weights(tmp_path):
    merged = add_lora(quantize(build(FLUX)))
    output = call(merged)
    assert torch.equal(call(load(save(merged, tmp_path))), output)


def test_loaded_model_is_offloaded_and_freed_like_others(row):
    import comfy.model_management

    quantized, file = row
    loaded = load(file)
    output = call(loaded)
    assert torch.equal(call(loaded, unload=3_000_000), output)
    comfy.model_management.unload_all_models()
    assert loaded.loaded_size() == 0
    assert torch.equal(call(loaded), output)


def test_other_nodes_see_its_layers(row):
    _, file = row
    loaded = load(file)
    found = []
    sample(fbcache(loaded, None, found.append, decision="first_block"), FLUX, steps=2)
    assert found[-1].residual_diff_threshold == pytest.approx(0.1345, abs=1e-4), "raised for dynamic schemes"
    both, report = report_of(loaded, "int8_weight_only", include="final_layer.linear")
    assert report.quantized == ("final_layer.linear",)
    assert report.left["double_blocks.0.img_mlp.0"] == "already quantized (by this node)"
    assert call(both).isfinite().all()


def test_ranks_load_the_file_themselves(row):
    from para_core.adapters.comfy_rank_models import from_recipe
    from para_core.adapters.comfy_travel import recipe_of

    quantized, file = row
    loaded = load(file)
    _, recipe = recipe_of(loaded)
    assert len(recipe) < 1000
    assert torch.equal(call(from_recipe(recipe)), call(quantized))


def test_files_of_other_kinds_are_refused_in_one_line(row, tmp_path):
    import comfy.utils

    from para_core.adapters.comfy_quantization import save_quantized_weights

    quantized, file = row
    tensors, metadata = comfy.utils.load_torch_file(file, return_metadata=True)
    layer = "model.diffusion_model.double_blocks.0.img_mlp.0"
    other = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    newer = torch.tensor(
        list(json.dumps({"para": {"scheme": "fp2", "shape": [1, 1], "dtype": "float32"}}).encode()), dtype=torch.uint8
    )
    path = str(tmp_path / "bad.safetensors")

    def refused(message, changed=None, removed=()):
        if changed is not None:
            kept = {name: tensor for name, tensor in (tensors | changed).items() if name not in removed}
            comfy.utils.save_torch_file(kept, path)
        with pytest.raises(ValueError, match=message) as error:
            load(path)
        assert len(str(error.value).splitlines()) == 1

    refused("^bad.safetensors was quantized by another program; load it with", {f"{layer}.comfy_quant": other})
    refused('^scheme "fp2" is not known here; update Para Accelerate', {f"{layer}.comfy_quant": newer})
    damaged = f"^bad.safetensors is damaged: {layer} is not complete; save the model anew"
    refused(damaged, {}, [f"{layer}.weight_scale"])
    refused(damaged, {f"{layer}.weight": tensors[f"{layer}.weight"][:-1].clone()})
    refused(
        "^bad.safetensors is damaged: final_layer.linear.bias is not in it",
        {}, ["model.diffusion_model.final_layer.linear.bias"],
    )  # fmt: skip
    if host_version()[:2] >= (0, 33):  # see `known`
        only_one_block = [name for name in tensors if "double_blocks.1" not in name]
        refused("^bad.safetensors holds a model that this ComfyUI does not know", {}, only_one_block)
    refused("^bad.safetensors holds no quantized layers; load it with Load Diffusion Model", {}, [
        name for name in tensors if name.endswith("comfy_quant")])  # fmt: skip
    save_quantized_weights(quantized, path)
    refused("^bad.safetensors holds only the quantized layers of a model; choose a file of the whole model")
    with open(path, "r+b") as opened:
        opened.truncate(1000)
    refused("^bad.safetensors cannot be read")
    path = str(tmp_path / "model.ckpt")
    refused("^model.ckpt is no safetensors file")
