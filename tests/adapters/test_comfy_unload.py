"""A model leaves the host's device for the ranks, also where the host is told to keep everything there."""

import pytest
import torch
from tiny_models import TINY_MODELS, build, sample
from tiny_models.lora import lora
from torch import nn

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = TINY_MODELS["flux"]
KEPT = torch.device("meta")  # where models go with --highvram and --gpu-only; here they are lost there


@pytest.mark.parametrize("strength", [None, 0.5], ids=["plain", "lora"])
def test_the_ranks_get_weights_that_the_host_would_have_kept_on_its_device(elsewhere, strength):
    model = build(FLUX)
    used = model if strength is None else lora(model, strength)
    plain = {name: weight.clone() for name, weight in model.model.state_dict().items()}
    expected = sample(used, FLUX)
    used.offload_device = KEPT
    assert torch.equal(sample(elsewhere(used), FLUX), expected)
    assert used.offload_device == KEPT
    assert all(torch.equal(weight, plain[name]) for name, weight in model.model.state_dict().items())


def test_weights_that_a_loader_has_put_on_the_device_leave_it(comfy):
    from comfy.model_patcher import ModelPatcher

    from para_core.adapters.comfy_unload import unload

    class There(nn.Module):
        """A module on a device that it only names."""

        def to(self, device):
            self.there = device

    model, exchanged = There(), There()
    patcher = ModelPatcher(model, load_device=torch.device("cpu"), offload_device=KEPT)
    patcher.add_object_patch("part", exchanged)
    unload(patcher)
    assert model.there == exchanged.there == model.device == torch.device("cpu")


def test_a_model_leaves_another_device_than_the_usual_one(comfy, monkeypatch):
    import comfy.model_management as management
    from comfy.model_patcher import ModelPatcher

    from para_core.adapters.comfy_unload import unload

    def nothing_free(device=None, torch_free_too=False):
        return (0, 0) if torch_free_too else 0

    monkeypatch.setattr(management, "get_all_torch_devices", lambda: [torch.device("cpu"), KEPT], raising=False)
    monkeypatch.setattr(management, "get_free_memory", nothing_free)
    patchers = [ModelPatcher(nn.Module(), load_device=KEPT, offload_device=torch.device("cpu")) for _ in range(2)]
    management.load_models_gpu(patchers)
    unload(patchers[0])
    assert [one.model for one in management.current_loaded_models if one.model in patchers] == patchers[1:]
    unload(patchers[1])


def test_a_model_that_goes_to_the_cpu_anyway_is_moved_once(comfy, monkeypatch):
    from comfy.model_patcher import ModelPatcher

    from para_core.adapters.comfy_unload import unload

    model, moves = build(FLUX), []
    monkeypatch.setattr(ModelPatcher, "unpatch_model", lambda self, *args, **kwargs: moves.append(args))
    unload(model)
    assert moves == []


def test_ranks_do_not_keep_on_their_devices_what_the_server_does():
    from para_core.adapters.comfy_rank_arguments import rank_arguments

    server = {"highvram": True, "gpu_only": True, "cpu": False, "reserve_vram": 2.0}
    assert rank_arguments(server, torch.device("cuda:1")) == server | {"highvram": False, "gpu_only": False}
    assert rank_arguments(server, torch.device("cpu"))["cpu"]
    assert server["highvram"]
