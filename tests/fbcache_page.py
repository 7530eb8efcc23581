"""The demo workflow in ComfyUI's interface, and the FBCache Patcher's panel in it."""

from __future__ import annotations

import json
from pathlib import Path

from fixtures_browser import READY
from fixtures_server import SETTINGS

ROOT = Path(__file__).absolute().parent.parent

DEMO = ROOT / "workflows" / "para_demo.json"

TYPE = "ParaFBCachePatcher"

NODE = f"app.rootGraph.nodes.find(node => node.type === '{TYPE}')"

PANEL = f"({NODE}).widgets.find(widget => widget.name === 'para_fbcache')?.element"

CELLS = "['computed', 'reused', 'coming'].map(name => root.querySelectorAll('rect.' + name).length)"

# The panel is drawn before this listener is called: it was registered later.
RECORD = f"""() => {{
    window.states = []
    app.api.addEventListener('para.fbcache', ({{ detail }}) => {{
        const root = ({PANEL}).shadowRoot
        window.states.push({{ cells: {CELLS}, finished: detail.finished }})
    }})
}}"""

SET = """([type, values]) => {
    const node = app.rootGraph.nodes.find(node => node.type === type)
    for (const [name, value] of Object.entries(values)) node.widgets.find(widget => widget.name === name).value = value
}"""


def open_page(interface, *, locale="en", vue=False, palette="dark"):
    """The demo workflow in a page that knows of no run; returns the page."""
    chosen = {"Comfy.Locale": locale, "Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": palette}
    interface.server.request("/settings", SETTINGS | chosen)
    interface.page.goto(interface.server.url)
    interface.page.wait_for_function(READY, timeout=120_000)
    interface.page.evaluate("chosen => { window.chosen = chosen }", chosen)
    interface.load(DEMO)
    interface.page.wait_for_timeout(1000)  # it moves to where everything is in view
    interface.look_at(TYPE, 0.8)
    return interface.page


def open_demo(interface, *, vue=False):
    """The demo workflow in English, in the page that is open where that shows it so."""
    chosen = {"Comfy.Locale": "en", "Comfy.VueNodes.Enabled": vue, "Comfy.ColorPalette": "dark"}
    if interface.page.url == "about:blank" or interface.page.evaluate("() => window.chosen") != chosen:
        return open_page(interface, vue=vue)
    # Under an id of its own: the page remembers the runs of a workflow.
    number = interface.page.evaluate("() => window.number = (window.number ?? 0) + 1")
    workflow = json.loads(DEMO.read_text(encoding="utf-8")) | {"id": f"daed08dd-14ed-5cf0-a402-{number:012}"}
    interface.page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'demo')", workflow)
    interface.look_at(TYPE, 0.8)
    return interface.page


def choose(page, type_: str, **values) -> None:
    page.evaluate(SET, [type_, values])


def run(interface, *, steps: int, threshold: float) -> list[dict]:
    """Run it with these settings; what the panel showed after each event."""
    choose(interface.page, "KSampler", steps=steps)
    choose(interface.page, TYPE, residual_diff_threshold=threshold)
    interface.server.free()  # a cached run sends no events
    interface.page.evaluate(RECORD)
    interface.run()
    interface.page.wait_for_function("() => states.at(-1)?.finished")
    return interface.page.evaluate("() => states")


def text(page) -> str:
    return page.evaluate(f"() => ({PANEL}).shadowRoot.querySelector('section').innerText").replace("\n", " ")


def panels(page):
    return page.locator("[data-panel=para_fbcache] > section")


def save_picture(interface, name: str) -> None:
    """The patcher and its neighbours, large enough to read."""
    interface.look_at(TYPE, 1.25)
    interface.page.wait_for_timeout(400)
    interface.screenshot(name)
