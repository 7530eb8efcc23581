"""The conversion of a saved workflow into what the server runs, on a host of three made-up nodes."""

from __future__ import annotations

import copy

import pytest

from para_core.demo.workflow import to_api

SEED = ["INT", {"control_after_generate": True}]
OBJECT_INFO = {
    "Load": {
        "input": {"required": {"name": [["a", "b"], {}]}},
        "input_order": {"required": ["name"]},
    },
    "Patch": {
        "input": {"required": {"model": ["MODEL", {}], "threshold": ["FLOAT", {}]}},
        "input_order": {"required": ["model", "threshold"]},
    },
    "Sample": {
        "input": {"required": {"model": ["MODEL"], "seed": SEED, "steps": ["INT", {}]}, "optional": {"tag": ["COMBO"]}},
        "input_order": {"required": ["model", "seed", "steps"], "optional": ["tag"]},
    },
}
MODEL_OUT = [{"name": "MODEL", "type": "MODEL"}]


def model_in(link):
    return [{"name": "model", "type": "MODEL", "link": link}]


WORKFLOW = {
    "nodes": [
        {"id": 1, "type": "Load", "outputs": MODEL_OUT, "widgets_values": ["b"]},
        {"id": 2, "type": "Patch", "inputs": model_in(1), "outputs": MODEL_OUT, "widgets_values": [0.1]},
        {"id": 3, "type": "Sample", "inputs": model_in(2), "widgets_values": [7, "fixed", 28, "x"]},
        {"id": 4, "type": "MarkdownNote", "widgets_values": ["read me"]},
    ],
    "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "MODEL"]],
}


def changed(index: int, **entries) -> dict:
    workflow = copy.deepcopy(WORKFLOW)
    workflow["nodes"][index].update(entries)
    return workflow


def test_widgets_get_their_names_and_links_their_sources():
    assert to_api(WORKFLOW, OBJECT_INFO) == {
        "1": {"class_type": "Load", "inputs": {"name": "b"}},
        "2": {"class_type": "Patch", "inputs": {"model": ["1", 0], "threshold": 0.1}},
        "3": {"class_type": "Sample", "inputs": {"model": ["2", 0], "seed": 7, "steps": 28, "tag": "x"}},
    }


def test_bypassed_node_is_wired_through():
    prompt = to_api(changed(1, mode=4), OBJECT_INFO)
    assert set(prompt) == {"1", "3"}
    assert prompt["3"]["inputs"]["model"] == ["1", 0]


def test_linked_widget_takes_the_link():
    linked = [*model_in(1), {"name": "threshold", "type": "FLOAT", "widget": {"name": "threshold"}, "link": 1}]
    assert to_api(changed(1, inputs=linked), OBJECT_INFO)["2"]["inputs"]["threshold"] == ["1", 0]


def test_api_prompt_stays_as_it_is():
    prompt = to_api(WORKFLOW, OBJECT_INFO)
    assert to_api(prompt, OBJECT_INFO) is prompt


@pytest.mark.parametrize(
    ("workflow", "message"),
    [
        (changed(1, type="Gone"), 'a node "Gone" that this ComfyUI does not know; install the pack'),
        (changed(1, mode=2), 'node 2 "Patch" is muted; bypass or remove it'),
        (changed(1, widgets_values=[]), 'node 2 "Patch" has no value for "threshold"; save the workflow anew'),
        (changed(1, widgets_values=[1, 2]), r'node 2 "Patch" has more values than inputs: \[2\]'),
    ],
)
def test_what_it_cannot_convert_is_refused_by_name(workflow, message):
    with pytest.raises(ValueError, match=message):
        to_api(workflow, OBJECT_INFO)
