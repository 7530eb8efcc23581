"""What the FBCache Patcher shows in ComfyUI's own interface, live and after the run; screenshots stay in out/."""

from __future__ import annotations

import json
import re

import pytest
from fbcache_page import DEMO, NODE, PANEL, TYPE, choose, open_demo, open_page, panels, run, save_picture, text

SEND = """(changes) => {
    const records = [...Array(28).keys()].map(step => ({
        step, sigma: 1 - step / 28, reused: step % 3 === 1,
        diff: step ? 0.05 + 0.2 * Math.abs(Math.sin(step / 3)) : null,
    }))
    const report = {
        node: '3', workflow: app.rootGraph.id, conditionings: { positive: records }, residual_diff_threshold: 0.1,
        num_calls: 28, num_reused_calls: 9, num_block_calls: 199, num_block_calls_baseline: 280, seconds: 4.2,
        computed_seconds: 3, reused_seconds: 0.3, num_bytes: 3 * 2 ** 20, num_steps: 28, finished: true,
        decision: 'first_block', target_speedup: 0, ...changes,
    }
    app.api.dispatchEvent(new CustomEvent('para.fbcache', { detail: report }))
}"""
CONTRAST = f"""() => {{
    const style = getComputedStyle(({PANEL}).shadowRoot.querySelector('section'))
    const luminance = colour => {{
        const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
            .map(value => value / 255).map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b
    }}
    const [dark, light] = [luminance(style.color), luminance(style.backgroundColor)].sort((a, b) => a - b)
    return (light + 0.05) / (dark + 0.05)
}}"""
FITS = f"""() => {{
    const section = ({PANEL}).shadowRoot.querySelector('section')
    const {{ pos, size }} = {NODE}
    const [right, bottom] = app.canvas.ds.convertOffsetToCanvas([pos[0] + size[0], pos[1] + size[1]])
    const canvas = app.canvas.canvas.getBoundingClientRect()
    const panel = section.getBoundingClientRect()
    return panel.height > 0 && section.scrollWidth <= section.clientWidth
        && panel.right <= canvas.left + right && panel.bottom <= canvas.top + bottom
}}"""
LANGUAGES = {
    "en": {
        "facts": r"(\d+) of (\d+) block calls computed, (\d+)% saved.* s, model about \d+\.\d\dx.*\d+\.\d\d MiB held",
        "strip": "{} of {} reused",
        "zero": "Nothing is reused at threshold 0.",
        "none": "Nothing was reused. With fewer than 10 steps that is expected",
        "raise": "Raise residual_diff_threshold or take more steps.",
    },
    "zh": {
        "facts": r"块调用 (\d+)/(\d+)，节省 (\d+)%.*用时 \d+\.\d\d 秒，模型速度约为 \d+\.\d\d 倍.*占用 \d+\.\d\d MiB",
        "strip": "复用 {}/{}",
        "zero": "阈值为 0 时从不复用。",
        "none": "一步都没有复用。少于 10 步时这是正常的",
        "raise": "请调大残差差异阈值，或增加步数。",
    },
}


@pytest.fixture(autouse=True)
def nothing_breaks(interface):
    interface.broken.clear()
    yield
    assert interface.broken == []


@pytest.mark.parametrize("locale", LANGUAGES)
def test_strip_fills_while_sampling_and_tells_what_came_out(interface, vue, locale):
    words, name = LANGUAGES[locale], f"fbcache_{'vue' if vue else 'classic'}_{locale}"
    page = open_page(interface, locale=locale, vue=vue)
    assert panels(page).count() == 0, "nothing to show yet"
    states = run(interface, steps=40, threshold=1.0)
    between = [state["cells"] for state in states if not state["finished"]]
    assert all(sum(cells) == 40 for cells in between)
    assert any(computed + reused > 0 and coming > 0 for computed, reused, coming in between)
    numbers_coming = [coming for _, _, coming in between]
    assert numbers_coming == sorted(numbers_coming, reverse=True)

    computed, reused, coming = states[-1]["cells"]
    assert (computed + reused, coming) == (40, 0) and reused > 0
    assert words["strip"].format(reused, 40) in text(page)
    calls, baseline, saved = map(int, re.search(words["facts"], text(page)).groups())
    assert saved == round(100 * (1 - calls / baseline)) > 0
    panels(page).wait_for(state="visible")
    save_picture(interface, f"{name}.png")

    run(interface, steps=12, threshold=0.0)
    assert words["zero"] in text(page)
    run(interface, steps=6, threshold=0.0001)
    assert words["none"] in text(page) and words["raise"] in text(page)
    save_picture(interface, f"{name}_nothing_reused.png")


def test_saved_workflow_and_prompt_are_those_without_the_panel(interface, vue):
    page = open_demo(interface, vue=vue)
    page.wait_for_timeout(500)
    saved = "() => app.rootGraph.serialize()"
    workflow, prompt = page.evaluate(saved), interface.prompt()
    page.evaluate(SEND, {})
    panels(page).wait_for(state="visible")
    page.wait_for_function(FITS)  # it has grown
    assert page.evaluate(saved) == workflow
    assert interface.prompt() == prompt


def test_panel_fits_into_its_node(interface, vue):
    """Also with a second conditioning and with advice that needs several lines."""
    page = open_demo(interface, vue=vue)
    records = [{"step": step, "sigma": 0.5, "diff": 0.3, "reused": False} for step in range(8)]
    several = {label: records for label in ("positive", "negative", "positive #2")}
    page.evaluate(SEND, {"conditionings": several, "num_reused_calls": 0, "num_steps": 8})
    page.wait_for_function(FITS)


def test_panel_survives_undo_and_redo(interface, vue):
    """The interface builds all nodes anew for that; the panel must not count as a change of the workflow."""
    page = open_demo(interface, vue=vue)
    page.wait_for_timeout(1000)  # Nodes 2.0 gives nodes other sizes at first, which is a change
    page.mouse.click(1500, 500)
    page.evaluate(SEND, {})
    for value in (0.2, 0.3):
        choose(page, TYPE, residual_diff_threshold=value)
        page.mouse.click(1500, 500)
        page.wait_for_timeout(300)
    seen = []
    for key in ("Control+z", "Control+z", "Control+y", "Control+y"):
        page.keyboard.press(key)
        page.wait_for_timeout(1000)
        panels(page).wait_for(state="visible")
        page.wait_for_function(FITS)
        page.mouse.click(1500, 500)  # it looks for changes then; one more would end the way back
        seen.append(page.evaluate(f"() => ({NODE}).widgets[0].value"))
    assert seen == [0.2, -1, 0.2, 0.3]


def test_deleted_node_takes_its_panel_along(interface, vue):
    page = open_demo(interface, vue=vue)
    page.evaluate(SEND, {})
    panels(page).wait_for(state="visible")
    page.evaluate(f"() => app.rootGraph.remove({NODE})")
    panels(page).wait_for(state="detached")
    page.evaluate(SEND, {})
    page.wait_for_timeout(500)
    assert panels(page).count() == 0


def test_patcher_inside_a_subgraph_shows_its_run(interface, vue):
    page = open_demo(interface, vue=vue)
    page.evaluate(f"() => {{ window.inner = app.rootGraph.convertToSubgraph(new Set([{NODE}])) }}")
    interface.server.free()
    interface.run()
    page.evaluate("() => app.canvas.openSubgraph(inner.subgraph, inner.node)")
    panels(page).wait_for(state="visible", timeout=20_000)
    assert "of 28 reused" in panels(page).inner_text()
    page.wait_for_timeout(500)
    interface.screenshot(f"fbcache_subgraph_{'vue' if vue else 'classic'}.png")


def test_events_of_another_workflow_or_node_are_not_shown(interface):
    page = open_demo(interface)
    for changes in ({"workflow": "another"}, {"workflow": None}, {"node": "7"}, {"node": "99"}, {"node": "3:1"}):
        page.evaluate(SEND, changes)
    page.evaluate(SEND, {"conditionings": {}})
    assert page.evaluate("() => app.rootGraph.nodes.every(node => !node.widgets?.some(w => w.name === 'para_fbcache'))")


def test_run_that_ended_in_another_tab_is_shown_on_return(interface):
    page = open_demo(interface)
    first = page.evaluate("() => app.rootGraph.id")
    open_demo(interface)
    page.evaluate(SEND, {"workflow": first})
    assert not page.evaluate(f"() => ({PANEL})")
    workflow = json.loads(DEMO.read_text(encoding="utf-8")) | {"id": first}
    page.evaluate("workflow => app.loadGraphData(workflow, true, true, 'demo')", workflow)
    page.wait_for_function(f"() => ({PANEL})")


@pytest.mark.parametrize("palette", ["dark", "light"])
def test_words_are_readable_in_both_palettes(interface, palette):
    page = open_page(interface, palette=palette)
    page.evaluate(SEND, {"finished": False, "num_steps": 40})
    panels(page).wait_for(state="visible")
    assert "28 / 40" in text(page)
    assert page.evaluate(CONTRAST) >= 4.5, "WCAG AA"
    save_picture(interface, f"fbcache_{palette}.png")


def test_every_drawing_and_cell_has_a_title(interface):
    page = open_demo(interface)
    page.evaluate(SEND, {"num_steps": 30})
    svgs, cells = page.evaluate(
        f"""() => ['svg', 'rect'].map(name => [...({PANEL}).shadowRoot.querySelectorAll(name)]
            .map(element => element.querySelector(':scope > title')?.textContent))"""
    )
    assert svgs == [
        "positive: 9 of 28 reused",
        "The difference at each step; a dashed line is the threshold",
    ]
    assert cells[:2] == ["step 1: computed, difference -", "step 2: reused, difference 0.115"]
    assert cells[-2:] == ["to come", "to come"]


def test_steps_that_are_evaluated_twice_share_their_place(interface):
    page = open_demo(interface)
    records = [{"step": i // 2, "sigma": 1 - i / 20, "diff": 0.1, "reused": i % 2 == 1} for i in range(20)]
    page.evaluate(SEND, {"conditionings": {"positive": records}, "num_steps": 10})
    places = page.evaluate(
        f"""() => [...({PANEL}).shadowRoot.querySelectorAll('rect')].map(cell => ['x', 'width'].map(
            name => Number(cell.getAttribute(name))))"""
    )
    assert len(places) == 20
    assert all(i / 2 < x and x + width < i / 2 + 0.5 for i, (x, width) in enumerate(places))


def test_advice_names_the_limits_where_the_threshold_was_not_the_reason(interface):
    page = open_demo(interface)
    records = [{"step": step, "sigma": 0.5, "diff": 0.02, "reused": False} for step in range(20)]
    page.evaluate(SEND, {"conditionings": {"positive": records}, "num_reused_calls": 0, "num_steps": 20})
    assert "start_percent, end_percent, warmup_steps or too few steps leave no room for it." in text(page)
    assert "Raise" not in text(page)


def test_target_speedup_stands_in_for_the_threshold(interface):
    page = open_demo(interface)
    page.evaluate(SEND, {"target_speedup": 2.5, "decision": "prediction"})
    assert "target 2.5x" in text(page) and "threshold" not in text(page) and "estimated error (0 to" in text(page)
    assert page.evaluate(f"() => ({PANEL}).shadowRoot.querySelector('line.threshold')") is None
    page.evaluate(SEND, {"target_speedup": 0, "decision": "first_block"})
    assert "threshold 0.1" in text(page) and "first block's change (0 to" in text(page)
    assert page.evaluate(f"() => ({PANEL}).shadowRoot.querySelector('line.threshold')") is not None


def test_wheel_over_the_panel_zooms_the_canvas(interface):
    page = open_demo(interface)
    page.evaluate(SEND, {})
    panels(page).wait_for(state="visible")
    before = page.evaluate("() => app.canvas.ds.scale")
    panels(page).hover()
    page.mouse.wheel(0, -200)
    page.wait_for_function("before => app.canvas.ds.scale > before", arg=before)
