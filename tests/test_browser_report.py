"""What the Acceleration Report shows in ComfyUI's own interface, in its language; screenshots stay in out/."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import pytest
import torch

from para_core.quantization_plan import weight_obstacle
from para_core.quantization_report import note
from para_core.quantization_scheme import SCHEMES

DEMO = Path(__file__).absolute().parent.parent / "workflows" / "para_demo.json"
TYPE = "ParaAccelerationReport"
NODE = f"app.rootGraph.nodes.find(node => node.type === '{TYPE}')"
WIDGET = f"({NODE}).widgets?.find(widget => widget.name === 'para_report')"
PANEL = "[data-panel=para_report] > section"
# Every acceleration, in front of the cache: all of them share one run.
WIRE = """() => {
    const find = type => app.rootGraph.nodes.find(node => node.type === type)
    const patcher = find('ParaFBCachePatcher')
    for (const note of app.rootGraph.nodes.filter(node => node.type === 'MarkdownNote')) app.rootGraph.remove(note)
    const values = {
        ParaFP8Quantize: {}, ParaCompileModel: { backend: 'eager' },
        ParaContextParallelLauncher: { num_devices: 2, devices: 'cpu' },
    }
    let before = find('UNETLoader')
    for (const [index, [type, settings]] of Object.entries(Object.entries(values))) {
        const node = LiteGraph.createNode(type)
        app.rootGraph.add(node)
        node.pos = [350 * index - 350, -400]
        for (const [name, value] of Object.entries(settings)) node.widgets.find(w => w.name === name).value = value
        before.connect(0, node, 0)
        before = node
    }
    before.connect(0, patcher, 0)
    find('KSampler').widgets.find(widget => widget.name === 'steps').value = 12
}"""
FITS = f"""() => {{
    const {{ pos, size }} = {NODE}
    const panel = document.querySelector('[data-panel=para_report]').shadowRoot.querySelector('section')
    const box = panel.getBoundingClientRect()
    const [right, bottom] = app.canvas.ds.convertOffsetToCanvas([pos[0] + size[0], pos[1] + size[1]])
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return box.height > 0 && panel.scrollWidth <= panel.clientWidth
        && box.right <= canvas.left + right && box.bottom <= canvas.top + bottom
}}"""
TEXT = """() => {
    const has_parts = root => [...root.querySelectorAll('*')].some(part => part.shadowRoot)
    const text = part => part.shadowRoot ? text(part.shadowRoot.querySelector('section'))
        : has_parts(part) ? [...part.children].map(text).join('\\n') : part.innerText
    return text(document.querySelector('[data-panel=para_report]'))
}"""
SEND = """([sections, workflow, cached]) => {
    const event = (name, detail) => app.api.dispatchEvent(new CustomEvent(name, { detail }))
    event('execution_cached', { nodes: cached, prompt_id: 'some' })
    event('executed', {
        node: '11', display_node: '11', prompt_id: 'some',
        output: { para_report: [{ sections, workflow: workflow ?? app.rootGraph.id }] },
    })
}"""
SAID = {
    "en": [
        "FBCache Patcher · flux", r"positive\n\d+ of 12 reused", r"\d+ of \d+ block calls computed, \d+% saved",
        r"FP8 Quantize · int8_weight_only", r"\d+ layers quantized, \d+ left", r"before\n\d+(\.\d+)? MB\nafter\n\d",
        r"weight error 0\.\d\d%", r"left \(outside the blocks\): img_in, .*, .* and \d+ more",
        "weight only: less memory, not faster", r"Compile Model\n\d+ compilations in", "since the model was loaded",
        r"Context-Parallel Launcher\n2 ranks: batch 1 × ring [12] × Ulysses [12]", r"rank 1 \(cpu\): \d+(\.\d)? MB",
        "no restart during the run",
    ],
    "zh": [
        r"首块缓存 \(FBCache\) · flux", r"正向\n复用 \d+/12", r"块调用 \d+/\d+，节省 \d+%",
        "FP8 量化 · int8_weight_only", r"量化 \d+ 层，保留 \d+ 层", r"之前\n\d+(\.\d+)? MB\n之后\n\d",
        r"权重误差 0\.\d\d%", r"保留（在块之外）：img_in、.*、.* 等，另有 \d+ 层",
        "仅量化权重：节省内存，不加快速度", r"编译模型\n编译 \d+ 次", "模型加载以来编译",
        r"上下文并行启动器\n2 个进程：批次 1 × 环形 [12] × Ulysses [12]", r"进程 1（cpu）：\d+(\.\d)? MB",
        "运行期间没有重启",
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_breaks(interface):
    interface.broken.clear()
    yield
    assert interface.broken == []


@pytest.fixture(scope="module", autouse=True)
def stopped_afterwards(server):
    yield
    server.request("/para/ranks/stop", {})


def open_demo(interface, tmp_path, *, locale="en", vue=False):
    """The demo workflow under an id of its own: the page remembers the reports of a workflow."""
    interface.open(locale, vue=vue)
    file = tmp_path / "demo.json"
    file.write_text(json.dumps(json.loads(DEMO.read_text(encoding="utf-8")) | {"id": str(uuid.uuid4())}))
    interface.load(file)
    interface.page.wait_for_timeout(1000)  # it moves to where everything is in view
    return interface.page


def look(interface, name: str) -> None:
    interface.look_at(TYPE, 0.95)
    interface.page.wait_for_timeout(500)
    interface.screenshot(name)


def text_of(page) -> str:
    """Of the whole report: parts of it are panels with shadows of their own, into which inner_text does not look."""
    return page.evaluate(TEXT)


def quantized(left: dict[str, str], note: str = "") -> dict:
    figures = {"bytes_before": 400, "bytes_after": 100, "num_weights": 200, "weight_error": None}
    return {"scheme": "nf4", "quantized": ["one"], "left": left, "note": note, **figures}


@pytest.mark.parametrize("locale", SAID)
def test_report_speaks_the_language_of_the_interface(interface, vue, locale, tmp_path):
    """All but the first of the four find the whole run in the host's cache, and show the same."""
    page = open_demo(interface, tmp_path, locale=locale, vue=vue)
    page.evaluate(WIRE)
    interface.run()
    page.locator(PANEL).wait_for(state="visible")
    look(interface, f"report_{'vue' if vue else 'classic'}_{locale}.png")
    text = text_of(page)
    assert [words for words in SAID[locale] if not re.search(words, text)] == [], text
    page.wait_for_function(FITS)
    assert page.evaluate(f"() => ({NODE}).imgs?.length ?? 0") == 0, "the English picture lies over it"
    assert page.locator("[data-node-id='11'] img").count() == 0


def test_every_reason_of_the_server_has_its_words(interface, tmp_path):
    page = open_demo(interface, tmp_path, locale="zh")
    weights = [None, torch.zeros(3, 3), torch.zeros(32, 32, dtype=torch.int8)]
    reasons = [weight_obstacle(weight) for weight in weights]
    reasons += ["excluded", "outside the blocks", "modulation, norms, embedders", "already quantized (by this node)"]
    notes = {note(scheme, torch.device("cpu")) for scheme in SCHEMES.values()}
    page.evaluate(
        SEND, [{"fp8": [quantized({f"l{i}": why for i, why in enumerate(reasons)}, n) for n in notes]}, None, []]
    )
    text = text_of(page)
    assert text.count("权重误差 未知") == len(notes) > 1 and text.count("\n保留（") == len(notes) * len(reasons)
    assert set(re.findall("[a-z]{3,}", text)) <= {"int", "cpu"}, text


def test_nothing_to_report_and_ranks_that_were_not_asked(interface, tmp_path):
    page = open_demo(interface, tmp_path)
    page.evaluate(SEND, [{}, None, []])
    assert text_of(page).startswith("Nothing to report: this MODEL has no acceleration.")
    ranks = [{"device": f"cuda:{rank}", "memory_bytes": 3 * 2**30} for rank in range(2)]
    parallel = {"mesh": "batch 2 x ring 1 x Ulysses 1", "ranks": ranks, "num_restarts": 2, "asked": False}
    page.evaluate(SEND, [{"parallel": parallel}, None, []])
    text = text_of(page)
    assert "rank 1 (cuda:1): 3 GB" in text and "restarts during the run: 2; what was lost" in text
    assert text.endswith("The ranks were not asked: another node runs the model itself.")


def test_report_of_another_workflow_is_not_shown_unless_the_host_kept_it_for_this_one(interface, tmp_path):
    page = open_demo(interface, tmp_path)
    assert not page.evaluate(f"() => !!{WIDGET}")
    page.evaluate(SEND, [{}, "another", []])
    assert not page.evaluate(f"() => !!{WIDGET}")
    page.evaluate(SEND, [{}, "another", ["11"]])
    page.locator(PANEL).wait_for(state="visible")


def test_saved_workflow_is_that_without_the_panel(interface, vue, tmp_path):
    page = open_demo(interface, tmp_path, vue=vue)
    saved = page.evaluate("() => app.rootGraph.serialize()")
    page.evaluate(SEND, [{"fp8": [quantized({}) for _ in range(5)]}, None, []])
    page.locator(PANEL).wait_for(state="visible")
    page.wait_for_function(FITS)
    assert page.evaluate("() => app.rootGraph.serialize()") == saved
