"""What Compile Model shows in ComfyUI's own interface while it compiles and after; screenshots stay in out/."""

from __future__ import annotations

import copy
import json
import re
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent
DEMO = json.loads((ROOT / "workflows" / "para_demo.json").read_text(encoding="utf-8"))
TYPE = "ParaCompileModel"
NODE = f"app.rootGraph.nodes.find(node => node.type === '{TYPE}')"
PANEL = f"({NODE}).widgets.find(widget => widget.name === 'para_compile')?.element"
TEXT = f"({PANEL}).shadowRoot.querySelector('section').innerText"
# The panel is drawn before this listener is called: it was registered later.
RECORD = f"""() => {{
    window.states = []
    window.bars = []
    app.api.addEventListener('para.compile', ({{ detail }}) => {{
        const bar = ({PANEL}).shadowRoot.querySelector('progress')
        window.states.push({{ text: {TEXT}, bar: bar && bar.value / bar.max, detail }})
    }})
    app.api.addEventListener('progress_state', ({{ detail }}) => {{
        const {{ value, max, state }} = detail.nodes[({NODE}).id] ?? {{}}
        if (max) window.bars.push(state === 'finished' ? state : value / max)
    }})
}}"""
SEND = "detail => app.api.dispatchEvent(new CustomEvent('para.compile', { detail }))"
SIZE = """width => {
    app.rootGraph.nodes.find(node => node.type === 'EmptySD3LatentImage').widgets[0].value = width
}"""
COMPILING = {"en": r"^compiling (double|single)_block, \d+ s", "zh": r"^正在编译 (double|single)_block，\d+ 秒"}
DONE = {"en": r"^2 compilations in \d+\.\d s", "zh": r"^编译 2 次，用时 \d+\.\d 秒"}
AGAIN = {"en": "2 of them recompilations", "zh": "其中重新编译 2 次"}
REASON = {"en": "another size", "zh": "尺寸不同"}
MOVED = "its weights are offloaded, with a LoRA on them"
NOTHING = {"en": "nothing had to be compiled", "zh": "无需编译"}


def workflow(**settings) -> dict:
    """The demo with Compile Model between the loader and the cache, in place of the notes; small, and of two steps."""
    values = {"scope": "blocks", "mode": "default", "dynamic": "auto", "fullgraph": False, "backend": "eager"}
    demo = copy.deepcopy(DEMO) | {"id": str(uuid.uuid4())}
    demo["nodes"] = [node for node in demo["nodes"] if node["type"] != "MarkdownNote"]
    for node in demo["nodes"]:
        if node["type"] == "EmptySD3LatentImage":
            node["widgets_values"][:2] = [64, 64]
        if node["type"] == "KSampler":
            node["widgets_values"][2] = 2  # steps
    demo["nodes"].append(
        {
            "id": 20, "type": TYPE, "pos": [-400, 60], "size": [310, 220], "flags": {}, "order": 1, "mode": 0,
            "inputs": [{"name": "model", "type": "MODEL", "link": 1}],
            "outputs": [{"name": "MODEL", "type": "MODEL", "links": [20]}],
            "properties": {"Node name for S&R": TYPE},
            "widgets_values": [*(values | settings).values(), False],
        }
    )  # fmt: skip
    first = next(link for link in demo["links"] if link[0] == 1)
    patcher = next(node for node in demo["nodes"] if node["id"] == first[3])
    demo["links"].append([20, 20, 0, *first[3:]])
    patcher["inputs"][first[4]]["link"] = 20
    first[3:5] = [20, 0]
    demo["last_node_id"] = demo["last_link_id"] = 20
    return demo


def open_workflow(interface, tmp_path, *, locale="en", vue=False, **settings):
    """The page with the workflow, of which it knows no run; the server has compiled nothing of it."""
    interface.server.free()
    interface.open(locale, vue=vue)
    file = tmp_path / "compile.json"
    file.write_text(json.dumps(workflow(**settings)))
    interface.load(file)
    interface.page.wait_for_timeout(1000)  # it moves to where everything is in view
    interface.look_at(TYPE, 1.25)
    interface.page.evaluate(RECORD)
    return interface.page


def states(page) -> list[dict]:
    """What the panel showed after each event of the run that has ended."""
    page.wait_for_function("() => states.at(-1)?.detail.finished")
    return page.evaluate("() => states.splice(0)")


def save_picture(interface, name: str) -> None:
    interface.look_at(TYPE, 1.25)
    interface.page.wait_for_timeout(400)
    interface.screenshot(name)


@pytest.fixture(autouse=True)
def nothing_breaks(interface):
    interface.broken.clear()
    yield
    assert interface.broken == []


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_panel_counts_compilations_and_says_why_again(interface, vue, locale, tmp_path):
    page, name = open_workflow(interface, tmp_path, locale=locale, vue=vue), f"{'vue' if vue else 'classic'}_{locale}"
    interface.run()
    seen = states(page)
    compiling = [state for state in seen if state["detail"]["compiling"]]
    assert {state["detail"]["compiling"] for state in compiling} == {"double_block", "single_block"}
    assert all(re.match(COMPILING[locale], state["text"]) for state in compiling)
    assert {state["bar"] for state in compiling} == {0, 0.5} and seen[-1]["bar"] is None
    assert re.match(DONE[locale], seen[-1]["text"]) and AGAIN[locale] not in seen[-1]["text"]
    page.evaluate(SEND, compiling[-1]["detail"])
    save_picture(interface, f"compile_{name}.png")
    bars = page.evaluate("() => bars.splice(0)")
    assert {0.25, 0.75} <= set(bars) and bars[-1] == "finished", "the host's own bar, on the node"

    page.evaluate(SIZE, 96)
    interface.run()
    last = states(page)[-1]["text"]
    assert AGAIN[locale] in last and last.count(REASON[locale]) == 2
    save_picture(interface, f"compile_{name}_again.png")

    page.evaluate(SIZE, 64)
    interface.run()
    assert states(page)[-1]["text"].startswith(NOTHING[locale])

    said = {"en": f"30 block calls uncompiled: {MOVED}", "zh": "30 次块调用未编译：权重已卸载，且带有 LoRA"}
    page.evaluate(SEND, seen[-1]["detail"] | {"compiled": [], "uncompiled": {MOVED: 30}})
    assert said[locale] in page.evaluate(f"() => {TEXT}")
