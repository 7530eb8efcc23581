"""The room that the host makes on its devices before a run, and what the ranks lack there."""

import gc
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from fixtures_in_process import Context
from tiny_models import TINY_MODELS, build, host_version, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = TINY_MODELS["flux"]


@dataclass(eq=False)
class Loaded:
    """Of the host's list of models, or of what a ControlNet has the host load."""

    size: int = 100
    here: int = 30
    load_device: torch.device = torch.device("cuda:1")

    @property
    def model(self):
        return self

    def model_size(self):
        return self.size

    def loaded_size(self):
        return self.here


@pytest.fixture
def room(monkeypatch):
    """The host's list of models, with a text encoder in it; and what it is asked to free, and to keep."""
    import comfy.model_management as management

    gc.collect()  # models of earlier tests take themselves off the host's own list
    loaded, freed = [Loaded()], []
    for name, value in {
        "current_loaded_models": loaded,
        "extra_reserved_memory": lambda: 7,
        "minimum_inference_memory": lambda: 20,
        "free_memory": lambda num_bytes, device, kept: freed.append((num_bytes, str(device), kept)),
        "soft_empty_cache": lambda: freed.append("empty"),
    }.items():
        monkeypatch.setattr(management, name, value)
    if host_version() >= (0, 33):
        in_care = [torch.device("cuda", number) for number in range(2)]
        monkeypatch.setattr(management, "get_all_torch_devices", lambda: in_care)
    return loaded, freed


def make_room_of(devices, loaded, *, conds=None, device="cuda:1", missing=(1000, 10)):
    """For a group of these devices, of whose models the host knows the first one but for the text encoder."""
    from para_core.adapters.comfy_room import make_room

    devices = [torch.device(device) for device in devices]
    session = SimpleNamespace(devices=devices, stands_for_ranks=lambda patcher: patcher in loaded[1:])
    model = SimpleNamespace(load_device=torch.device(device), model_dtype=lambda: torch.float32)
    make_room(model, session, missing=missing, memory=50, conds=conds or {})


@pytest.mark.parametrize(
    ("device", "devices", "asked"),
    [
        ("cuda:1", ("cuda:1", "cuda:2"), [(1.1 * 1000 + 50 + 7, "cuda:1")]),
        ("cuda:1", ("cuda:2", "cuda:1"), [(1.1 * 10 + 50 + 7, "cuda:1")]),
        ("cuda:1", ("cuda:2", "cuda:3"), []),
        ("cpu", ("cpu", "cpu"), []),
        ("cuda:2", ("cuda:0", "cuda:1"), [(1.1 * 1000 + 50 + 7, "cuda:0"), (1.1 * 10 + 50 + 7, "cuda:1")]),
    ],
    ids=["first", "second", "elsewhere", "cpu", "several"],
)
def test_the_host_makes_room_where_ranks_run(room, device, devices, asked):
    if len(asked) > 1 and host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 takes care of one device")
    loaded, freed = room
    loaded.append(Loaded())
    make_room_of(devices, loaded, device=device)
    assert freed == [(*one, [loaded[1]]) for one in asked] + ["empty"] * bool(asked)


def test_room_for_the_runs_own_controlnets_is_made_too(room):
    """They are about to be loaded into the room that was made for the ranks, and would be again in every run."""
    (loaded, freed), controlnet, elsewhere = room, Loaded(), Loaded(load_device=torch.device("cpu"))

    class Control:
        def get_models(self):
            return [controlnet, elsewhere]

        def inference_memory_requirements(self, dtype):
            return 3

    loaded.append(controlnet)
    make_room_of(("cuda:1",), [], conds={"positive": [{"control": Control()}]}, missing=(10,))
    assert freed == [(pytest.approx(1.1 * (10 + 70) + 50 + 7 + 3), "cuda:1", [controlnet]), "empty"]


def test_what_the_ranks_lack_on_their_devices_is_known(elsewhere, monkeypatch):
    """So that the host is asked for room for those weights only that are not there yet."""
    import comfy.model_management

    from para_core.adapters import comfy_parallel
    from para_core.adapters.comfy_quantization import apply_quantization

    asked, model = [], elsewhere(build(FLUX))

    def make_room(model, session, *, missing, **settings):
        asked.append([round(num_bytes / model.model_size(), 2) for num_bytes in missing])

    monkeypatch.setattr(comfy_parallel, "make_room", make_room)
    for _ in range(2):
        sample(model, FLUX, steps=1)
    sample(lora(model, 0.5), FLUX, steps=1)
    quantized, _ = apply_quantization(model, "int8_weight_only")
    for _ in range(2):
        sample(quantized, FLUX, steps=1)
    sample(model, FLUX, steps=1)
    comfy.model_management.unload_all_models()
    sample(model, FLUX, steps=1)
    leaves = elsewhere(build(FLUX), keep_loaded=False)
    for _ in range(2):
        sample(leaves, FLUX, steps=1)
    assert asked == [[share] for share in (1, 0, 0, 1, 0, 1, 1, 1, 1)]


def test_a_part_that_the_ranks_lack_is_known_until_they_have_it(elsewhere):
    """They load in part where room is short, and push a part off for a VAE."""
    model = build(FLUX)
    wired, group = elsewhere(model), elsewhere.group
    session = group.recover.__self__
    sample(wired, FLUX, steps=1)
    (there,) = group.service._variants.values()
    freed = there.partially_unload(torch.device("cpu"), model.model_size() / 3)
    assert 0 < freed < model.model_size() and session.missing(model) == [freed]
    sample(wired, FLUX, steps=1)
    assert session.missing(model) == [0]


def test_new_ranks_lack_everything(elsewhere):
    from para_core.adapters.comfy_rank import Service

    models = [elsewhere(build(FLUX, seed=seed)) for seed in (0, 1)]
    for model in models:
        sample(model, FLUX, steps=1)
    group = elsewhere.group
    session, original = group.recover.__self__, group.call

    def lost(method, payload, **settings):
        group.service, group.call = Service(Context()), original
        group.recover()
        return original(method, payload, **settings)

    group.call = lost
    assert session.missing(models[0]) == [models[0].model_size()]


def test_room_is_made_before_the_ranks_build_a_model(elsewhere, monkeypatch):
    from para_core.adapters import comfy_parallel

    done = elsewhere.group.calls
    monkeypatch.setattr(comfy_parallel, "make_room", lambda *args, **settings: done.append("make_room"))
    sample(elsewhere(lora(build(FLUX), 0.5)), FLUX, steps=1)
    assert [call for call in done if call not in ("forward", "end")] == [
        "make_room",
        "configure",
        "load",
        "patch",
        "begin",
    ]
