"""The tab in the sidebar that shows the launcher's processes, in ComfyUI's own interface; screenshots stay in out/."""

from __future__ import annotations

import re

import pytest
from parallel_prompts import WORKFLOW, ranks, spread

NONE = {"en": "No processes are running.", "zh": "没有正在运行的进程。"}
WORDS = {"en": ("idle", "memory", "Stop all", "Rank"), "zh": ("空闲", "内存", "全部停止", "进程")}
MESH = {"en": "batch 1 × ring 1 × Ulysses 2", "zh": "批次 1 × 环形 1 × Ulysses 2"}


def open_tab(frontend, locale: str) -> None:
    frontend.open(locale)
    frontend.page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.para.ranks')")
    frontend.page.get_by_text(re.compile("|".join((NONE[locale], WORDS[locale][2])))).first.wait_for()


def close_tab(frontend) -> None:
    frontend.page.evaluate("() => app.extensionManager.command.execute('Workspace.ToggleSidebarTab.para.ranks')")


@pytest.mark.parametrize("locale", ["en", "zh"])
def test_ranks_are_shown_and_stopped_from_the_sidebar(frontend, server, locale):
    server.request("/para/ranks/stop", {})
    open_tab(frontend, locale)
    page = frontend.page
    assert page.get_by_text(NONE[locale]).is_visible()
    server.run_workflow(spread(server, seed=50 + list(NONE).index(locale)))  # the same one again would not be run
    for rank in ranks(server):
        card = page.locator(f"article[data-rank='{rank['rank']}']", has_text=WORDS[locale][0])
        card.wait_for()  # the tab looks once a second, and may have looked last in the middle of the run
        text = card.inner_text()
        assert f"{WORDS[locale][3]} {rank['rank']} · cpu" in text and f"pid {rank['pid']}" in text
        assert WORDS[locale][1] in text
    assert page.get_by_text(MESH[locale]).is_visible()
    frontend.load(WORKFLOW)  # behind the tab, for people who look at the picture
    frontend.page.wait_for_timeout(500)
    frontend.screenshot(f"ranks_{locale}.png")
    page.get_by_role("button", name=WORDS[locale][2]).evaluate("button => button.click()")
    page.get_by_text(NONE[locale]).wait_for()
    assert ranks(server) == []
    close_tab(frontend)
    assert frontend.broken == []
