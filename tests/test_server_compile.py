"""Compile Model through a real ComfyUI server: cancelling while something is compiled."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from test_server import demo

from para_core.demo.host import HostError


def compiling(server, **changes: dict) -> dict:
    """A short run of the demo with Compile Model in front of the cache."""
    small = {"KSampler": {"steps": 2}, "EmptySD3LatentImage": {"width": 64, "height": 64}}
    prompt = demo(server, **(small | changes))
    patcher = next(node for node in prompt.values() if node["class_type"] == "ParaFBCachePatcher")
    settings = {"scope": "blocks", "mode": "default", "dynamic": "auto", "fullgraph": False, "backend": "aot_eager"}
    prompt["compile"] = {"class_type": "ParaCompileModel", "inputs": {"model": patcher["inputs"]["model"], **settings}}
    patcher["inputs"]["model"] = ["compile", 0]
    return prompt


def test_cancel_takes_effect_after_the_current_compilation(server):
    server.free()
    events = []

    def press_cancel(type_, data):
        events.append((type_, data))
        if type_ == "para.compile" and data["compiling"] and len(pressed) == 0:
            pressed.append(pool.submit(server.request, "/interrupt", {}))

    pressed = []
    with ThreadPoolExecutor(1) as pool, pytest.raises(HostError, match="interrupted at KSampler"):
        server.run_workflow(compiling(server), listener=press_cancel)
    last = [data for type_, data in events if type_ == "para.compile"][-1]
    assert last["finished"] and [one["name"] for one in last["compiled"]] == ["double_block"]
    bars = [
        data["nodes"]["compile"] for type_, data in events if type_ == "progress_state" and "compile" in data["nodes"]
    ]
    assert bars[-1]["state"] == "finished", "the bar does not stay behind"

    run = server.run_workflow(compiling(server))
    last = run.events_of("para.compile")[-1]
    assert [one["name"] for one in last["compiled"]] == ["single_block"], "what was compiled is kept"
    assert len(run.images) == 1
