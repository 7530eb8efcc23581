"""The tab in the sidebar that shows the launcher's processes, in ComfyUI's own interface; screenshots stay in out/."""

from __future__ import annotations

import re

import pytest
from test_server_parallel import ranks, spread

NONE = {"en": "No processes are running.", "zh": "没有正在运行的进程。"}
WORDS = {"en": ("idle", "memory", "Stop all"), "zh": ("空闲", "内存", "全部停止")}


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
    server.free()  # a cached run needs no processes
    server.run_workflow(spread(server, seed=50))
    for rank in ranks(server):
        card = page.locator(f"article[data-rank='{rank['rank']}']", has_text=WORDS[locale][0])
        card.wait_for()  # the tab looks once a second, and may have looked last in the middle of the run
        text = card.inner_text()
        assert f"{rank['rank']}: cpu" in text and f"pid {rank['pid']}" in text
        assert WORDS[locale][1] in text
    assert page.get_by_text(re.compile("batch 1 x ring 1 x Ulysses 2")).is_visible()
    frontend.screenshot(f"ranks_{locale}.png")
    page.get_by_role("button", name=WORDS[locale][2]).evaluate("button => button.click()")
    page.get_by_text(NONE[locale]).wait_for()
    assert ranks(server) == []
    close_tab(frontend)
    assert frontend.broken == []
