"""The shipped weights: their layout, ComfyUI's stock loaders, and both implementations of the same model."""

import random

import numpy as np
import pytest
import torch
from safetensors import safe_open

from para_core.demo import weights
from para_core.demo.checker import attribute_accuracy
from para_core.demo.prompt import encode
from para_core.demo.sampling import pack, predict
from para_core.demo.scene import EXAMPLE_PROMPT, random_scene, to_array

FILES = (weights.TRANSFORMER_FILE, weights.AUTOENCODER_FILE)


def relative_error(got, want):
    return ((got - want).norm() / want.norm()).item()


def images_of(count):
    rng = random.Random(7)
    scenes = [random_scene(rng) for _ in range(count)]
    arrays = np.stack([to_array(scene.draw(rng)) for scene in scenes])
    return scenes, torch.from_numpy(arrays)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_files_are_small_and_say_their_licence():
    assert sum(path.stat().st_size for path in FILES) <= 40_000_000
    for path in FILES:
        with safe_open(path, "pt") as file:
            assert file.metadata()["license"] == "Apache-2.0"


def test_flux_keys_survive_the_way_there_and_back():
    pytest.importorskip("diffusers")
    state_dict = weights.build_transformer().state_dict()
    assert equal(weights.flux_to_diffusers(weights.flux_from_diffusers(state_dict)), state_dict)


def test_taesd_keys_survive_the_way_there_and_back():
    pytest.importorskip("diffusers")
    state_dict = weights.build_autoencoder().state_dict()
    assert equal(weights.taesd_to_diffusers(weights.taesd_from_diffusers(state_dict)), state_dict)


def test_flux_refuses_a_key_it_does_not_know():
    with pytest.raises(KeyError, match="img_out"):
        weights.flux_to_diffusers({"img_in.weight": torch.zeros(4, 4), "img_out.weight": torch.zeros(4, 4)})


def test_missing_file_says_what_to_do(monkeypatch, tmp_path):
    pytest.importorskip("diffusers")
    monkeypatch.setattr(weights, "AUTOENCODER_FILE", tmp_path / "gone.safetensors")
    with pytest.raises(FileNotFoundError, match="no gone.safetensors in .*; reinstall the package, or retrain it"):
        weights.load_autoencoder()


def test_missing_diffusers_says_what_to_do(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    with pytest.raises(ImportError, match="needs diffusers; run: pip install diffusers"):
        weights.load_transformer()


def test_load_gives_the_dtype_asked_for():
    pytest.importorskip("diffusers")
    for load in (weights.load_transformer, weights.load_autoencoder):
        for dtype in (torch.float32, torch.bfloat16):
            assert {parameter.dtype for parameter in load(dtype).parameters()} == {dtype}


def test_autoencoder_keeps_every_attribute_and_normalised_latents():
    pytest.importorskip("diffusers")
    autoencoder = weights.load_autoencoder()
    scenes, images = images_of(16)
    with torch.no_grad():
        latents = autoencoder.encode(images.permute(0, 3, 1, 2) * 2 - 1).latents
        decoded = (autoencoder.decode(latents).sample.permute(0, 2, 3, 1) + 1) / 2
    # calibrated to 0 and 1 on scenes of three objects; scenes of fewer, and only 16, scatter by this much
    assert latents.mean().abs() < 0.25 and (latents.std() - 1).abs() < 0.25
    mse = (decoded.clamp(0, 1) - images).square().mean((1, 2, 3))
    assert (-10 * torch.log10(mse)).mean() >= 32
    accuracy = [attribute_accuracy(*pair) for pair in zip(scenes, decoded.clamp(0, 1).numpy(), strict=True)]
    assert np.mean(accuracy) >= 0.995


def test_stock_loader_takes_the_transformer_and_agrees_with_diffusers(comfy):
    import comfy.sd

    pytest.importorskip("diffusers")
    patcher = comfy.sd.load_diffusion_model(str(weights.TRANSFORMER_FILE), model_options={"dtype": torch.float32})
    comfy.model_management.load_models_gpu([patcher])
    model = patcher.model
    assert type(model.model_config).__name__ == "FluxSchnell"
    context, pooled = encode(EXAMPLE_PROMPT)
    latents = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    for sigma in (torch.tensor([1.0]), torch.tensor([0.37])):
        got = model.diffusion_model(latents, sigma, context, pooled)
        want = predict(weights.load_transformer(), pack(latents), sigma, context, pooled)
        # float32 both; they differ in the order of sums and in the norms' epsilon
        assert relative_error(pack(got), want) < 1e-5


def test_stock_loader_takes_the_autoencoder_and_agrees_with_diffusers(comfy):
    import comfy.latent_formats
    import comfy.sd
    import comfy.utils

    pytest.importorskip("diffusers")
    state_dict, metadata = comfy.utils.load_torch_file(str(weights.AUTOENCODER_FILE), return_metadata=True)
    vae = comfy.sd.VAE(sd=state_dict, metadata=metadata)
    vae.throw_exception_if_invalid()
    assert vae.latent_channels == 16
    autoencoder, (_, images) = weights.load_autoencoder(), images_of(2)
    host = comfy.latent_formats.Flux().process_in(vae.encode(images))
    own = autoencoder.encode(images.permute(0, 3, 1, 2) * 2 - 1).latents
    assert relative_error(host, own) < 1e-4  # ComfyUI scales and shifts the latents on the way
    decoded = vae.decode(comfy.latent_formats.Flux().process_out(own))
    want = (autoencoder.decode(own).sample.permute(0, 2, 3, 1) + 1) / 2
    assert relative_error(decoded, want.clamp(0, 1)) < 1e-4
