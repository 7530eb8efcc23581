"""The shipped workflows in ComfyUI's own interface, as a person meets them; screenshots stay in out/."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from para_core.demo.workflow import to_api

ROOT = Path(__file__).absolute().parent.parent
DEMO, FLUX = ROOT / "workflows" / "para_demo.json", ROOT / "workflows" / "flux1_dev_fbcache.json"
PARALLEL = ROOT / "workflows" / "para_demo_parallel.json"
PATCHER = """() => app.rootGraph.nodes.find(node => node.type === 'ParaFBCachePatcher')"""


def select_patcher(frontend) -> None:
    frontend.page.evaluate(f"() => app.canvas.selectNode(({PATCHER})())")


def test_demo_workflow_loads_runs_and_shows_its_report(frontend, server):
    frontend.open()
    frontend.load(DEMO)
    assert frontend.missing_nodes() == []
    assert frontend.toasts() == []
    server.free()  # a cached run sends no report
    frontend.run()
    frontend.page.wait_for_function(f"() => ({PATCHER})().widgets.some(w => w.name === 'para_fbcache')")
    frontend.page.wait_for_function("() => app.rootGraph.nodes.find(n => n.type === 'SaveImage').imgs?.[0]?.complete")
    frontend.page.wait_for_timeout(500)
    frontend.screenshot("demo_workflow.png")
    assert frontend.broken == []


def test_quantized_model_is_shown_on_its_node_and_in_the_report(frontend):
    """Wired by hand in front of the patcher; the picture is for people to look at."""
    frontend.server.free()  # a node from the host's cache says nothing
    frontend.open()
    frontend.load(DEMO)
    page = frontend.page
    page.evaluate(
        """() => {
            const find = type => app.rootGraph.nodes.find(node => node.type === type)
            const fp8 = LiteGraph.createNode('ParaFP8Quantize')
            app.rootGraph.add(fp8)
            fp8.pos = [find('ParaFBCachePatcher').pos[0], find('ParaFBCachePatcher').pos[1] - 400]
            find('UNETLoader').connect(0, fp8, 0)
            fp8.connect(0, find('ParaFBCachePatcher'), 0)
        }"""
    )
    frontend.run()
    shown = page.locator("[data-panel=para_fp8] > section").text_content()
    assert "int8_weight_only: 3" in shown and "weight error 0.7" in shown
    report = page.locator("[data-panel=para_report]")
    report.get_by_text("FP8 Quantize · int8_weight_only").wait_for()
    assert report.locator("article").count() == 2, "two sections below each other"
    frontend.look_at("ParaAccelerationReport", 1)
    page.wait_for_timeout(500)
    frontend.screenshot("report_fp8.png")
    assert frontend.broken == []


@pytest.mark.parametrize("file", [DEMO, FLUX, PARALLEL], ids=lambda file: file.stem)
def test_own_conversion_is_the_interface_s(frontend, server, file):
    frontend.open()
    frontend.load(file)
    sent = {
        node_id: {"class_type": node["class_type"], "inputs": node["inputs"]}
        for node_id, node in frontend.prompt().items()
    }
    assert to_api(json.loads(file.read_text(encoding="utf-8")), server.object_info()) == sent


def test_parallel_workflow_loads_with_nothing_missing(frontend):
    frontend.open()
    frontend.load(PARALLEL)
    frontend.page.wait_for_timeout(500)
    frontend.screenshot("parallel_workflow.png")
    assert frontend.missing_nodes() == frontend.toasts() == []


def test_flux_workflow_misses_nothing_but_the_models(frontend):
    frontend.open()
    frontend.load(FLUX)
    frontend.screenshot("flux1_dev_fbcache.png")
    assert set(frontend.missing_nodes()) == {"UNETLoader", "DualCLIPLoader", "VAELoader"}
    assert frontend.page.evaluate("() => app.rootGraph.nodes.every(n => n.type in LiteGraph.registered_node_types)")


def test_chinese_interface_speaks_chinese(frontend):
    frontend.open("zh")
    frontend.load(DEMO)
    frontend.screenshot("demo_workflow_zh.png")
    words = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text(encoding="utf-8"))["ParaFBCachePatcher"]
    labels = frontend.page.evaluate(f"() => Object.fromEntries(({PATCHER})().widgets.map(w => [w.name, w.label]))")
    assert frontend.page.evaluate(f"() => ({PATCHER})().title") == words["display_name"]
    assert labels == {name: entry["name"] for name, entry in words["inputs"].items() if name != "model"}


@pytest.mark.parametrize(
    ("locale", "button", "heading", "sentence"),
    [
        ("zh", "节点信息", "首块缓存 (FBCache)", "从不复用，结果与原图完全一致"),
        ("en", "Node Info", "FBCache Patcher", "never reuse, the picture is exactly the original"),
    ],
)
def test_help_page_opens_from_the_node(frontend, locale, button, heading, sentence):
    frontend.open(locale)
    frontend.load(DEMO)
    select_patcher(frontend)
    frontend.page.get_by_label(button).first.evaluate("button => button.click()")
    frontend.page.get_by_text(sentence).first.wait_for(timeout=20_000)
    assert frontend.page.locator("h1", has_text=heading).count()
    frontend.screenshot(f"help_{locale}.png")
