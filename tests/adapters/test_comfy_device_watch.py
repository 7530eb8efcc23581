"""The ranks free their devices when the host wants the memory of one of theirs, and not for that of another."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import TINY_MODELS, build, host_version, sample

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = TINY_MODELS["flux"]
HERE, THERE = torch.device("cpu"), torch.device("meta")  # of the host's model, and another that it takes care of


def free(num_bytes):
    return lambda device=None, torch_free_too=False: (num_bytes, num_bytes) if torch_free_too else num_bytes


@pytest.fixture
def host(comfy, monkeypatch):
    """The host's memory management on two devices, the second of which is none of the CPU."""
    import comfy.model_management as management

    from para_core.adapters.comfy_session import Session

    if host_version() >= (0, 33):
        monkeypatch.setattr(management, "get_all_torch_devices", lambda: [HERE, THERE])

    monkeypatch.setattr(management, "get_free_memory", free(0))
    monkeypatch.setattr(Session, "world_size", 1)  # of a group that has two devices in name only
    monkeypatch.setattr(Session, "missing", lambda self, model: [0] * len(self.devices))
    yield management
    management.unload_all_models()


def sampled(elsewhere, *devices):
    """The ranks' calls after a run of a group with these devices."""
    elsewhere.group.config = SimpleNamespace(devices=tuple(map(str, devices)))
    model = elsewhere(build(FLUX))
    sample(model, FLUX, steps=1)
    return model, elsewhere.group.calls


@pytest.mark.parametrize(
    ("devices", "wanted", "frees"),
    [
        ((THERE,), HERE, False),
        ((THERE,), THERE, True),
        ((HERE,), HERE, True),
        ((HERE, THERE), HERE, True),
        ((HERE, THERE), THERE, True),
    ],
)
def test_ranks_free_their_devices_for_one_of_them(elsewhere, host, devices, wanted, frees):
    if host_version() < (0, 33) and wanted != HERE:
        pytest.skip("ComfyUI 0.3 takes care of one device")
    _, calls = sampled(elsewhere, *devices)
    host.free_memory(1e9, wanted)
    # ComfyUI 0.3 cannot tell to free one device from to free all, and the ranks rather give too much.
    assert ("unload" in calls) == (frees or host_version() < (0, 33))


@pytest.mark.parametrize("devices", [(THERE,), (HERE, THERE)])
def test_ranks_free_their_devices_when_the_host_unloads_everything(elsewhere, host, devices):
    model, calls = sampled(elsewhere, *devices)
    for _ in range(2):
        host.unload_all_models()
        assert "unload" in calls
        calls.clear()
        sample(model, FLUX, steps=1)
        assert "unload" not in calls


def test_a_decode_alone_is_freed_too(elsewhere, host):
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 takes care of one device")
    from para_core.adapters.comfy_session import Session

    session = Session(elsewhere.group)
    elsewhere.group.config = SimpleNamespace(devices=("meta",))
    elsewhere.group.service.decode_vae = lambda payload: {"images": payload["samples"]}
    session.decode({"model": "vae"}, torch.zeros(1), {})
    host.unload_all_models()
    assert "unload" in elsewhere.group.calls


def test_what_the_host_takes_off_its_list_to_put_it_back_stays(elsewhere, host):
    _, calls = sampled(elsewhere, HERE)
    twin = elsewhere.group.recover.__self__.twin
    host.load_models_gpu([twin])
    assert "unload" not in calls


@pytest.mark.parametrize(("devices", "share"), [((THERE,), 0), ((HERE,), 1), ((HERE, THERE), 1 / 2)])
def test_a_run_wants_of_the_hosts_device_what_the_ranks_there_need(elsewhere, host, monkeypatch, devices, share):
    """Else one of two groups side by side would have the other one free the device that the host computes on."""
    asked, sampling, original, group = [], [], host.load_models_gpu, elsewhere.group

    def load_models_gpu(models, **settings):
        if "minimum_memory_required" in settings:  # not a rank's
            asked.append((settings["memory_required"], settings["minimum_memory_required"]))
        return original(models, **settings)

    def call(method, payload, **settings):
        if method == "forward":
            sampling.append(group.recover.__self__.twin.memory_required([1, *FLUX.latent]))
        return type(group).call(group, method, payload, **settings)

    monkeypatch.setattr(host, "load_models_gpu", load_models_gpu)
    group.call, here = call, build(FLUX)
    sample(here, FLUX, steps=1)
    sampled(elsewhere, *devices)
    whole, found = asked
    assert whole[0] > whole[1] > 0 and found == tuple(share * num_bytes for num_bytes in whole)
    assert sampling == [here.memory_required([1, *FLUX.latent])], "by which it puts conditionings into one call"


def test_the_host_leaves_every_device_of_the_ranks(elsewhere, host, monkeypatch):
    """To which nodes of the host's may have sent a text encoder."""
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 takes care of one device")
    from comfy.model_patcher import ModelPatcher

    model, calls = sampled(elsewhere, THERE)
    text_encoder = ModelPatcher(torch.nn.Identity(), load_device=THERE, offload_device=HERE)
    with monkeypatch.context() as plenty:
        plenty.setattr(host, "get_free_memory", free(1e12))
        host.load_models_gpu([text_encoder])
    sample(model, FLUX, steps=1)
    assert text_encoder not in host.loaded_models() and "unload" not in calls
