"""How long the ranks have a model: as long as the host has it, in runs of several, and not longer."""

import gc
import sys
import time
import weakref
from pathlib import Path

import pytest
import torch
from fixtures_in_process import dying
from safetensors.torch import save_file
from tiny_models import TINY_MODELS, build, fbcache, host_version, relative, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = TINY_MODELS["flux"]


def test_models_of_one_workflow_stay_on_the_ranks(elsewhere):
    """As Wan 2.2's two for high and low noise: in turn, also with another LoRA on one of them."""
    models = [build(FLUX), build(FLUX, seed=1)]
    expected = [sample(model, FLUX) for model in models]
    wired = [elsewhere(model) for model in models]
    for _ in range(2):
        for model, result in zip(wired, expected, strict=True):
            assert torch.equal(sample(model, FLUX), result)
    changed = sample(lora(models[1], 0.5), FLUX)
    assert torch.equal(sample(lora(wired[1], 0.5), FLUX), changed)
    assert torch.equal(sample(wired[0], FLUX), expected[0])
    counts = {method: elsewhere.group.calls.count(method) for method in ("load", "patch", "forget")}
    assert counts == {"load": 2, "patch": 3, "forget": 0}


def test_ranks_forget_what_the_host_has_dropped(elsewhere):
    """With the next model at the latest."""
    group = elsewhere.group
    there = group.service._models
    dropped, kept = build(FLUX), elsewhere(build(FLUX, seed=1))
    weights = weakref.ref(next(dropped.model.diffusion_model.parameters()))
    expected = sample(kept, FLUX)
    sample(fbcache(elsewhere(dropped), 100.0), FLUX)
    assert len(there) == 2
    del dropped
    gc.collect()
    assert len(there) == 2 and weights() is None, "the host's own go at once"
    assert torch.equal(sample(kept, FLUX), expected)
    assert len(there) == 1 and group.calls.count("forget") == 1


def test_ranks_forget_between_runs(elsewhere):
    """Diffusion models and the VAE, and not a model that is used again meanwhile."""
    from comfy.model_patcher import ModelPatcher

    session, service = elsewhere.group.recover.__self__, elsewhere.group.service
    models = [build(FLUX, seed=seed) for seed in (0, 1)]
    for model in models:
        sample(elsewhere(model), FLUX, steps=1)
    vae = ModelPatcher(torch.nn.Linear(2, 2), torch.device("cpu"), torch.device("cpu"))
    session.prepared.vae(vae)
    session.tidy()
    assert len(service._models) == 2 and service._vae is not None
    del model, models[0], vae
    gc.collect()
    session.tidy()
    assert list(service._models) == [session.prepared.built_as(models[0])] and service._vae is None
    assert torch.equal(sample(elsewhere(models[0]), FLUX), sample(models[0], FLUX))


def test_a_file_that_is_loaded_again_is_still_there(elsewhere, tmp_path):
    """As by a server that keeps no results between prompts; its pages cost no memory."""
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3's loaders leave no recipe")
    import comfy.sd

    file, results = tmp_path / "flux.safetensors", []
    save_file(build(FLUX).model.diffusion_model.state_dict(), file)
    for _ in range(2):
        model = elsewhere(comfy.sd.load_diffusion_model(str(file)))
        results.append(sample(model, FLUX, steps=2))
        del model
        gc.collect()
        elsewhere.group.recover.__self__.tidy()
    assert torch.equal(*results)
    assert elsewhere.group.calls.count("load") == 1 and "forget" not in elsewhere.group.calls


def shared_bytes(pid: int) -> int:
    """Of what the server has sent to a rank to stay there."""
    lines = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines() if "memfd:" in line]
    return sum(stop - start for start, stop in ([int(end, 16) for end in line[0].split("-")] for line in lines))


@pytest.mark.skipif(sys.platform != "linux", reason="reads of the ranks' memory in /proc")
def test_processes_let_go_of_memory_soon_after_the_host_has(groups):
    """As with "Free model and node cache", after which nothing need be sampled any more."""
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.parallel_config import ParallelConfig

    config, model = ParallelConfig(("cpu", "cpu")), build(FLUX)
    sample(apply_parallel(model, config, groups.session), FLUX, steps=1)
    session = groups.session(config)
    gc.collect()
    session.tidy()  # what earlier tests have left
    pids = [rank["pid"] for rank in session.group.state()["ranks"]]
    size = sum(parameter.nbytes for parameter in model.model.diffusion_model.parameters())
    before = [shared_bytes(pid) for pid in pids]
    assert size > 2**20 and min(before) >= size
    del model
    gc.collect()
    end = time.monotonic() + 30
    while any(shared_bytes(pid) > there - size for pid, there in zip(pids, before, strict=True)):
        assert time.monotonic() < end, "the ranks still hold it"
        time.sleep(0.1)


@pytest.mark.parametrize("private", [0, 1000], ids=["sent", "private"])
@pytest.mark.parametrize(("free", "num_left"), [(0, 1), (10**15, 2)])
def test_copies_of_weights_give_way_to_the_next_model(elsewhere, monkeypatch, free, num_left, private):
    import comfy.model_management

    from para_core.adapters import comfy_shared_weights

    monkeypatch.setattr(comfy_shared_weights, "private_bytes", lambda patcher: private)
    models = [elsewhere(build(FLUX, seed=seed)) for seed in (0, 1)]
    expected = sample(models[0], FLUX)

    def get_free_memory(device=None, torch_free_too=False):
        return (free, free) if torch_free_too else free

    monkeypatch.setattr(comfy.model_management, "get_free_memory", get_free_memory)
    sample(models[1], FLUX, steps=1)
    assert len(elsewhere.group.service._models) == num_left
    assert torch.equal(sample(models[0], FLUX), expected)


def test_a_restart_brings_back_the_model_of_the_run_and_others_when_they_are_needed(elsewhere):
    group, models = elsewhere.group, [elsewhere(lora(build(FLUX, seed=seed), 0.7)) for seed in (0, 1)]
    expected = [sample(model, FLUX) for model in models]
    dying(group, lambda number: number == 3)
    group.calls.clear()
    assert torch.equal(sample(models[1], FLUX), expected[1])
    assert group.calls.count("load") == 1
    assert torch.equal(sample(models[0], FLUX), expected[0])
    assert group.calls.count("load") == 2


def test_models_of_a_client_that_is_gone_are_forgotten(elsewhere):
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.adapters.comfy_session import Session
    from para_core.parallel_config import ParallelConfig

    first, second = build(FLUX), build(FLUX, seed=1)
    sample(elsewhere(first), FLUX)
    session = Session(elsewhere.group)
    sample(apply_parallel(second, ParallelConfig(("cpu",)), lambda config: session), FLUX)
    assert len(elsewhere.group.service._models) == 1


def test_what_a_client_that_is_gone_made_of_a_model_goes_too(elsewhere, tmp_path):
    """The next one has the same file, and calls it by the same name."""
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3's loaders leave no recipe")
    import comfy.sd

    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.adapters.comfy_quantization import apply_quantization
    from para_core.adapters.comfy_session import Session
    from para_core.parallel_config import ParallelConfig

    file = tmp_path / "flux.safetensors"
    save_file(build(FLUX).model.diffusion_model.state_dict(), file)
    first, second = (comfy.sd.load_diffusion_model(str(file)) for _ in range(2))
    expected = sample(second, FLUX)
    quantized, _ = apply_quantization(lora(first, 0.7), "int8_weight_only")
    assert relative(sample(elsewhere(quantized), FLUX), expected) > 1e-3
    session = Session(elsewhere.group)
    result = sample(apply_parallel(second, ParallelConfig(("cpu",)), lambda config: session), FLUX)
    assert relative(result, expected) <= 1e-6


def test_nothing_of_a_model_is_kept_after_its_run(elsewhere):
    """By the stand-in, which the host knows as long as the ranks have something on their devices."""
    from para_core.adapters.comfy_quantization import apply_quantization

    quantized = elsewhere(apply_quantization(build(FLUX), "int8_weight_only")[0])
    sample(quantized, FLUX)
    twin = elsewhere.group.recover.__self__.twin
    assert twin is not None and twin.model.diffusion_model.original is quantized.model.diffusion_model
    held = [weakref.ref(quantized.model), *(weakref.ref(layer) for layer in quantized.object_patches.values())]
    elsewhere.group.service.forget({"models": list(elsewhere.group.service._models)})
    del quantized
    gc.collect()
    assert {ref() for ref in held} == {None}
    with pytest.raises(AttributeError):
        _ = twin.model.diffusion_model.img_in
