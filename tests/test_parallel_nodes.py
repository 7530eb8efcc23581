"""The nodes of several devices where one is left: they do what they say without processes, or refuse."""

import sys
from types import SimpleNamespace

import pytest
import torch

LAUNCHER = {"ring_degree": 0, "ulysses_degree": 0, "batch_parallel": "auto", "backend": "auto", "attach_to": ""}
LAUNCHER |= {"keep_loaded": True}
DECODER = {"backend": "auto", "attach_to": ""}
LATENT = {"samples": torch.zeros(1, 4, 2, 2)}


@pytest.fixture
def launch(pack, said):
    def launch(model, **settings):
        return pack.nodes["ParaContextParallelLauncher"].execute(model, **LAUNCHER | settings).args[0]

    return launch


@pytest.fixture
def decode(pack, said):
    def decode(vae, **settings):
        return pack.nodes["ParaParallelVAEDecode"].execute(LATENT, vae, **DECODER | settings).args[0]

    return decode


@pytest.fixture
def said(pack, monkeypatch):
    """The kinds of notices that the nodes send."""
    found = []
    for name in ("ParaContextParallelLauncher", "ParaParallelVAEDecode"):
        monkeypatch.setattr(pack.nodes[name], "hidden", SimpleNamespace(unique_id="7"), raising=False)
        module = sys.modules[pack.nodes[name].__module__]
        monkeypatch.setattr(module, "send_notice", lambda node_id, notice: found.append(notice.kind))
    return found


def on(device):
    """What the nodes look at of a MODEL and of a VAE there."""
    there = torch.device(device)
    return SimpleNamespace(load_device=there, device=there, decode=lambda latent: torch.ones(1, 8, 8, 3))


@pytest.mark.parametrize(("number", "names"), [(1, ""), (0, ""), (1, "cpu"), (0, "cpu")])
def test_the_hosts_own_device_changes_nothing(launch, decode, said, number, names):
    model = on("cpu")
    assert launch(model, num_devices=number, devices=names) is model
    assert torch.equal(decode(model, num_devices=number, devices=names), torch.ones(1, 8, 8, 3))
    assert said == ["one_device", "decoded_alone"]


def test_one_device_where_the_host_does_not_compute_is_refused(launch, decode, said):
    message = 'devices is "cpu", but one device gets no processes of its own, and ComfyUI computes on cuda:0. Name at'
    for node in (launch, decode):
        with pytest.raises(ValueError, match=message):
            node(on("cuda:0"), num_devices=0, devices="cpu")
    assert said == []


@pytest.mark.parametrize("setting", [{"ring_degree": 4}, {"ulysses_degree": 2}, {"batch_parallel": "on"}])
def test_degrees_that_one_device_cannot_have_are_refused(launch, said, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))} is .*, but there is one device; use "):
        launch(on("cpu"), num_devices=1, devices="", **setting)
    assert said == []
