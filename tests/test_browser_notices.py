"""What the FP8 nodes and those of several devices say on themselves in ComfyUI's own interface, in its language."""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path

import pytest

from para_core.parallel_notice import NOTICES, REPLACED, ParallelNotice

PARALLEL = json.loads(
    (Path(__file__).absolute().parent.parent / "workflows" / "para_demo_parallel.json").read_text(encoding="utf-8")
)
LAUNCHER, DECODER, FP8 = "ParaContextParallelLauncher", "ParaParallelVAEDecode", "ParaFP8Quantize"
# Beside each other, in front of the others and above them.
WIRE = """seed => {
    const find = type => app.rootGraph.nodes.find(node => node.type === type)
    const choose = (type, values) => {
        for (const [name, value] of Object.entries(values)) find(type).widgets.find(w => w.name === name).value = value
    }
    for (const note of app.rootGraph.nodes.filter(node => node.type === 'MarkdownNote')) app.rootGraph.remove(note)
    app.rootGraph.add(LiteGraph.createNode('ParaFP8Quantize'))
    find('UNETLoader').connect(0, find('ParaFP8Quantize'), 0)
    find('ParaFP8Quantize').connect(0, find('ParaContextParallelLauncher'), 0)
    choose('ParaContextParallelLauncher', { num_devices: 2, devices: 'cpu' })
    choose('KSampler', { steps: 2, seed })
    const types = ['ParaFP8Quantize', 'ParaContextParallelLauncher', 'ParaParallelVAEDecode']
    types.forEach((type, index) => { find(type).pos = [420 * index, -620] })
}"""
ADD = """types => types.map(type => {
    const node = LiteGraph.createNode(type)
    app.rootGraph.add(node)
    return String(node.id)
})"""
SEND = """([event, detail]) =>
    app.api.dispatchEvent(new CustomEvent(event, { detail: { workflow: app.rootGraph.id, ...detail } }))"""
# By node: the text of its panel, the names of what it shows beside its inputs, and whether the panel is inside it.
SEEN = """type => {
    const { pos, size, widgets } = app.rootGraph.nodes.find(node => node.type === type)
    const shown = widgets.filter(widget => /^para_|preview/.test(widget.name))
    const panel = shown[0]?.element?.shadowRoot?.querySelector('section')
    const box = panel?.getBoundingClientRect()
    const [right, bottom] = app.canvas.ds.convertOffsetToCanvas([pos[0] + size[0], pos[1] + size[1]])
    const canvas = app.canvas.canvas.getBoundingClientRect()
    return {
        text: panel?.innerText, names: shown.map(widget => widget.name),
        fits: box?.height > 0 && panel.scrollWidth <= panel.clientWidth
            && box.right <= canvas.left + right && box.bottom <= canvas.top + bottom,
    }
}"""
FITS = f"types => types.every(type => ({SEEN})(type).fits)"
SIZE = r"\d+(\.\d+)? [KM]B"
SAID = {
    "en": {
        FP8: rf"int8_weight_only: \d+ layers quantized, \d+ left\n{SIZE} → {SIZE} \(0\.\d\d\)\n"
        r"weight error 0\.\d\d% \(relative L2\)\n13 left: modulation, norms, embedders\n"
        r"8 left: outside the blocks\nweight only: less memory, not faster",
        LAUNCHER: "2 ranks: batch 1 × ring [12] × Ulysses [12]",
        DECODER: "Decoded on 2 ranks.",
    },
    "zh": {
        FP8: rf"int8_weight_only：量化 \d+ 层，保留 \d+ 层\n{SIZE} → {SIZE}（0\.\d\d）\n"
        r"权重误差 0\.\d\d%（相对 L2）\n保留 13 层：调制、归一化与嵌入层\n"
        r"保留 8 层：在块之外\n仅量化权重：节省内存，不加快速度",
        LAUNCHER: "2 个进程：批次 1 × 环形 [12] × Ulysses [12]",
        DECODER: "由 2 个进程解码。",
    },
}
REPORT = {
    "scheme": "nf4", "quantized": ["one"], "left": {}, "bytes_before": 400, "bytes_after": 100, "num_weights": 200,
    "weight_error": None, "note": "",
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


def open_workflow(interface, tmp_path, *, locale, vue=False):
    """The shipped workflow for several devices, under an id of its own: the page remembers what was said."""
    interface.open(locale, vue=vue)
    file = tmp_path / "parallel.json"
    file.write_text(json.dumps(PARALLEL | {"id": str(uuid.uuid4())}))
    interface.load(file)
    interface.page.wait_for_timeout(1000)  # it moves to where everything is in view
    return interface.page


@pytest.mark.parametrize("locale", SAID)
def test_nodes_say_once_and_in_the_language_of_the_interface_what_they_do(interface, vue, locale, tmp_path):
    page = open_workflow(interface, tmp_path, locale=locale, vue=vue)
    page.evaluate(WIRE, uuid.uuid4().int % 2**32)
    interface.server.free()  # a node from the host's cache says nothing
    saved = page.evaluate("() => app.rootGraph.serialize().nodes.map(node => node.widgets_values)")
    interface.run()
    interface.look_at(FP8, 0.95)
    page.wait_for_function(FITS, arg=list(SAID[locale]))
    page.wait_for_timeout(500)
    interface.screenshot(f"notices_{'vue' if vue else 'classic'}_{locale}.png")
    for type_, pattern in SAID[locale].items():
        seen = page.evaluate(SEEN, type_)
        assert re.fullmatch(pattern, seen["text"]), seen["text"]
        assert len(seen["names"]) == 1, "said twice"
    assert page.evaluate("() => app.rootGraph.serialize().nodes.map(node => node.widgets_values)") == saved


def test_every_notice_has_its_words(interface, tmp_path):
    page = open_workflow(interface, tmp_path, locale="zh", vue=True)
    node = page.evaluate(f"() => String(app.rootGraph.nodes.find(node => node.type === '{LAUNCHER}').id)")
    for kind in NOTICES:
        notice = ParallelNotice(kind, 3, "batch 1 x ring 3 x Ulysses 1")
        page.evaluate(SEND, ["para.parallel", {"node": node, **vars(notice)}])
        text = page.evaluate(SEEN, LAUNCHER)["text"]
        assert text.endswith(("。", "批次 1 × 环形 3 × Ulysses 1")), text
        assert set(re.findall("[A-Za-z]{2,}", text)) <= {"VAE", "Ulysses"}, text
    page.evaluate(SEND, ["para.parallel", {"node": node, **vars(notice), "replaced": ["cuda:0", "cuda:1"]}])
    assert (
        page.evaluate(SEEN, LAUNCHER)["text"] == f"{text}\n已结束 cuda:0、cuda:1 上的进程，因为它们使用了其中的设备。"
    )
    page.evaluate(SEND, ["para.parallel", {"node": node, **vars(notice)}])
    page.evaluate(SEND, ["para.parallel", {"node": node, "workflow": "another", **vars(ParallelNotice("not_asked"))}])
    assert page.evaluate(SEEN, LAUNCHER)["text"] == text
    said = NOTICES | {"replaced": REPLACED}
    english = page.evaluate("async () => (await import('/extensions/para-accelerate/report_words.js')).wordsOf('en')")
    assert {kind: english[kind] for kind in said} == {
        kind: text.replace("num_ranks", "count") for kind, text in said.items()
    }


def test_other_nodes_of_quantized_weights_say_it_too(interface, tmp_path):
    page = open_workflow(interface, tmp_path, locale="zh", vue=True)
    types = ["ParaFP8QuantizeCLIP", "ParaLoadQuantizedModel"]
    for type_, node in zip(types, page.evaluate(ADD, types), strict=True):
        page.evaluate(SEND, ["para.fp8", {"node": node, **REPORT}])
        lines = page.evaluate(SEEN, type_)["text"].splitlines()
        assert lines == ["nf4：量化 1 层，保留 0 层", "400 B → 100 B（0.25）", "权重误差 未知（相对 L2）"]
