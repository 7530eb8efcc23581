"""The shipped demo workflow and the pack's pages, through a real ComfyUI server."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from para_core.demo.checker import attribute_accuracy
from para_core.demo.host import HostError
from para_core.demo.scene import Scene
from para_core.demo.workflow import to_api

ROOT = Path(__file__).absolute().parent.parent
SHIPPED = ROOT / "workflows" / "para_demo.json"
PATCHER, PROMPT = "ParaFBCachePatcher", "ParaDemoPrompt"


def demo(server, **changes: dict) -> dict:
    """The demo workflow as an API prompt, with inputs changed: class name to {input: value}."""
    prompt = to_api(json.loads(SHIPPED.read_text(encoding="utf-8")), server.object_info())
    for class_type, inputs in changes.items():
        next(node for node in prompt.values() if node["class_type"] == class_type)["inputs"].update(inputs)
    return prompt


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def shipped_run(server):
    server.free()  # other tests may have run it already
    return server.run_workflow(json.loads(SHIPPED.read_text(encoding="utf-8")))


def test_demo_workflow_draws_its_prompt(server, shipped_run):
    (image,) = shipped_run.images
    prompt = next(node for node in demo(server).values() if node["class_type"] == PROMPT)["inputs"]["prompt"]
    assert attribute_accuracy(Scene.parse(prompt), pixels(image)) == 1


def test_run_reports_its_steps_for_the_node(server, shipped_run):
    *running, report = shipped_run.events_of("para.fbcache")
    assert demo(server)[report["node"]]["class_type"] == PATCHER
    assert report["finished"] and not any(earlier["finished"] for earlier in running)
    assert list(report["conditionings"]) == ["positive"], "at cfg 1 the negative prompt is not evaluated"
    steps = report["conditionings"]["positive"]
    assert [record["step"] for record in steps] == list(range(28))
    assert sum(record["reused"] for record in steps) == report["num_reused_calls"]


@pytest.mark.parametrize(("decision", "num_computed"), [("first_block", {1}), ("prediction", {0, 1})])
def test_reused_steps_compute_one_block_or_none(server, decision, num_computed):
    settings = {"residual_diff_threshold": 1.0, "decision": decision}
    report = server.run_workflow(demo(server, ParaFBCachePatcher=settings)).events_of("para.fbcache")[-1]
    num_reused, num_blocks = report["num_reused_calls"], report["num_block_calls_baseline"] // report["num_calls"]
    in_reused = report["num_block_calls"] - num_blocks * (report["num_calls"] - num_reused)
    assert num_reused > 0
    assert min(num_computed) * num_reused <= in_reused <= max(num_computed) * num_reused


def test_threshold_0_and_a_bypassed_node_give_the_same_picture(server):
    bypassed = json.loads(SHIPPED.read_text(encoding="utf-8"))
    next(node for node in bypassed["nodes"] if node["type"] == PATCHER)["mode"] = 4
    plain = server.run_workflow(bypassed)
    exact = server.run_workflow(demo(server, ParaFBCachePatcher={"residual_diff_threshold": 0.0}))
    assert not plain.events_of("para.fbcache")
    assert exact.events_of("para.fbcache")[-1]["num_reused_calls"] == 0
    assert np.array_equal(pixels(plain.images[0]), pixels(exact.images[0]))


def test_same_workflow_again_is_served_from_the_host_s_cache(server):
    first, again = server.run_workflow(demo(server)), server.run_workflow(demo(server))
    assert again.images == first.images
    assert not again.events_of("para.fbcache")


def test_new_run_after_the_host_freed_everything_gives_the_same_picture(server, shipped_run):
    server.free()
    again = server.run_workflow(json.loads(SHIPPED.read_text(encoding="utf-8")))
    assert again.events_of("para.fbcache")
    assert np.array_equal(pixels(again.images[0]), pixels(shipped_run.images[0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {PATCHER: {"residual_diff_threshold": -0.5}},
            r"ParaFBCachePatcher: residual_diff_threshold is -0.5; allowed is .*Use 0 ",
        ),
        ({PATCHER: {"residual_diff_threshold": -2}}, r"ParaFBCachePatcher: Value -2.0 smaller than min of -1.0"),
        (
            {PATCHER: {"start_percent": 0.8, "end_percent": 0.2}},
            r"ParaFBCachePatcher: start_percent 0.8 and end_percent 0.2 do not make a range; allowed is ",
        ),
        ({PATCHER: {"warmup_steps": "many"}}, r"ParaFBCachePatcher: Failed to convert an input value to a INT value"),
        ({PROMPT: {"prompt": "a flying cat"}}, r'ParaDemoPrompt: prompt "a flying cat" is not a scene: .*for example'),
        ({"UNETLoader": {"unet_name": "gone.safetensors"}}, r"UNETLoader: Value not in list"),
    ],
    ids=["negative threshold", "threshold below -1", "percent range", "no number", "nonsense prompt", "missing file"],
)
def test_bad_input_gets_one_clear_line(server, changes, message):
    with pytest.raises(HostError, match=message) as error:
        server.run_workflow(demo(server, **changes))
    assert len(str(error.value).splitlines()[0]) < 400


def test_interface_finds_workflows_help_and_chinese_words(server):
    assert set(server.request("/workflow_templates")["para-accelerate"]) == {
        path.stem for path in SHIPPED.parent.glob("*.json")
    }
    assert server.request("/i18n")["zh"]["nodeDefs"][PATCHER]["display_name"] == "首块缓存 (FBCache)"
