"""The quantization nodes as ComfyUI runs them, and what they tell the interface."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tiny_models import FLUX, build, sample

from para_core.demo.checker import attribute_accuracy
from para_core.demo.host import HostError
from para_core.demo.scene import Scene
from para_core.demo.workflow import to_api

ROOT = Path(__file__).absolute().parent.parent
NODE = "ParaFP8Quantize"


class Listener:
    """In the place of the host's server: keeps what is sent."""

    client_id = "somebody"
    workflow = None  # of the run; the interface sends it along

    def __init__(self):
        self.events, self.texts = [], []
        self.prompt_queue = self

    def get_current_queue_volatile(self):
        return [(0, "some", {}, {"extra_pnginfo": {"workflow": self.workflow}})], []

    def send_sync(self, event, data, sid=None):
        self.events.append((event, json.loads(json.dumps(data)), sid))

    def send_progress_text(self, text, node_id, sid=None):
        self.texts.append((text, node_id, sid))


@pytest.fixture
def listener(pack, monkeypatch):
    import server

    found = Listener()
    monkeypatch.setattr(server.PromptServer, "instance", found, raising=False)
    for name in (NODE, f"{NODE}CLIP"):
        monkeypatch.setattr(pack.nodes[name], "hidden", SimpleNamespace(unique_id="7"), raising=False)
    return found


def test_node_quantizes_and_reports(pack, listener):
    model = build(FLUX)
    (quantized,) = pack.nodes[NODE].execute(model, "int8_weight_only", include="final_layer.linear").args
    assert quantized.model_size() < model.model_size()
    assert sample(quantized, FLUX, steps=1).isfinite().all()
    ((event, data, client),) = listener.events
    assert (event, data["node"], client) == ("para.fp8", "7", "somebody")
    assert data["scheme"] == "int8_weight_only" and "final_layer.linear" in data["quantized"]
    assert data["bytes_after"] < 0.27 * data["bytes_before"]
    assert data["left"]["img_in"] == "outside the blocks"
    assert data["workflow"] is None and listener.texts == [(data["summary"], "7", "somebody")]


def test_interface_finds_the_words_itself(pack, listener):
    """What it queued carries its workflow; a progress text would be a second line, in English."""
    listener.workflow = {"id": "this one"}
    pack.nodes[NODE].execute(build(FLUX), "int8_weight_only")
    ((event, data, client),) = listener.events
    assert (event, data["workflow"], client) == ("para.fp8", "this one", "somebody")
    assert data["summary"].startswith("int8_weight_only: ") and listener.texts == []


def test_auto_needs_no_package_on_the_cpu(pack, listener, monkeypatch):
    import sys

    for name in ("torchao", "torchao.quantization", "bitsandbytes", "bitsandbytes.functional"):
        monkeypatch.setitem(sys.modules, name, None)
    pack.nodes[NODE].execute(build(FLUX), "auto")
    assert listener.events[0][1]["scheme"] == "int8_weight_only"


def test_schemes_offered_are_those_that_can_run(pack):
    from para_core.quantization_scheme import SCHEMES, WEIGHT_ONLY

    def offered(name):
        return next(entry for entry in pack.nodes[name].GET_SCHEMA().inputs if entry.id == "scheme").options

    assert offered(NODE) == ["auto", *SCHEMES]
    assert offered(f"{NODE}CLIP") == ["auto", *WEIGHT_ONLY]


def quantized_demo(server, scheme):
    """The demo as an API prompt with FP8 Quantize, as node "fp8", between the loader and the cache."""
    workflow = json.loads((ROOT / "workflows" / "para_demo.json").read_text(encoding="utf-8"))
    prompt = to_api(workflow, server.object_info())
    patcher = next(node for node in prompt.values() if node["class_type"] == "ParaFBCachePatcher")
    inputs = {"model": patcher["inputs"]["model"], "scheme": scheme, "include": "", "exclude": ""}
    prompt["fp8"] = {"class_type": NODE, "inputs": inputs}
    patcher["inputs"]["model"] = ["fp8", 0]
    return prompt


@pytest.mark.parametrize("scheme", ["fp8_dynamic_per_row", "int8_weight_only"])
def test_demo_still_draws_its_prompt(server, scheme):
    """In the server, between the loader and the cache."""
    prompt = quantized_demo(server, scheme)
    run = server.run_workflow(prompt)
    text = next(node for node in prompt.values() if node["class_type"] == "ParaDemoPrompt")["inputs"]["prompt"]
    (image,) = run.images
    assert attribute_accuracy(Scene.parse(text), pixels(image)) == 1
    (report,) = run.events_of("para.fp8")
    assert report["node"] == "fp8" and report["scheme"] == scheme
    assert len(report["quantized"]) > 10
    assert run.events_of("para.fbcache")[-1]["num_reused_calls"] > 0


def test_saved_model_draws_the_same_picture_when_it_is_loaded_again(server):
    """Save Model behind the node, and after everything was freed, Load Quantized Model."""
    prompt = quantized_demo(server, "fp8_dynamic_per_row")
    next(node for node in prompt.values() if node["class_type"] == "KSampler")["inputs"]["steps"] = 4
    save = {"class_type": "ModelSave", "inputs": {"model": ["fp8", 0], "filename_prefix": "diffusion_models/saved"}}
    (expected,) = server.run_workflow(prompt | {"save": save}).images
    server.free()
    loader = next(name for name, node in prompt.items() if node["class_type"] == "UNETLoader")
    del prompt[loader]
    prompt["fp8"] = {"class_type": "ParaLoadQuantizedModel", "inputs": {"model_name": "saved_00001_.safetensors"}}
    run = server.run_workflow(prompt)
    assert np.array_equal(pixels(run.images[0]), pixels(expected))
    (report,) = run.events_of("para.fp8")
    assert report["scheme"] == "fp8_dynamic_per_row" and "weight error unknown" in report["summary"]
    prompt["fp8"]["inputs"]["model_name"] = "para_demo_flux.safetensors"
    with pytest.raises(HostError, match="ParaLoadQuantizedModel: para_demo_flux.safetensors holds no quantized layers"):
        server.run_workflow(prompt)


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))
