"""ComfyUI's own interface in a headless Chromium."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from fixtures_server import SETTINGS

from para_core.demo.host import PACK, ComfyServer

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync"
BROKEN = re.compile(r"Error (loading|calling) extension|already registered|preloadError")
# With nodes: it opens on a workflow of its own, which would replace one that is loaded before.
READY = """() => window.app?.extensionManager && window.app.rootGraph?.nodes.length
    && Object.keys(window.LiteGraph?.registered_node_types ?? {}).length > 300"""
RUN = """timeout => new Promise(async (resolve, reject) => {
    const { api } = app
    setTimeout(() => reject(new Error(`not finished after ${timeout} ms`)), timeout)
    api.addEventListener('execution_success', () => resolve(), { once: true })
    api.addEventListener('execution_error', e => reject(new Error(e.detail.exception_message)), { once: true })
    if (!await app.queuePrompt(0, 1)) reject(new Error('not queued'))
})"""
LOOK = """([type, scale]) => {
    const { ds } = app.canvas
    const { pos } = app.rootGraph.nodes.find(node => node.type === type)
    ds.scale = scale
    ds.offset = [-pos[0] + 120, -pos[1] + 100]
    app.canvas.setDirty(true, true)
}"""
MISSING = """() => app.rootGraph.nodes
    .filter(node => node.has_errors || !(node.type in LiteGraph.registered_node_types)).map(node => node.type)"""


class Frontend:
    """One open page of the interface; `broken` collects uncaught errors, and what the console says of extensions."""

    def __init__(self, page, server: ComfyServer) -> None:
        self.page = page
        self.server = server
        self.broken: list[str] = []
        self._opened_with: dict | None = None
        page.on("pageerror", lambda error: self.broken.append(str(error)))
        page.on("console", lambda line: self.broken.append(line.text) if BROKEN.search(line.text) else None)

    def open(self, locale: str = "en", *, vue: bool = False) -> None:
        """Show the interface in this language, anew unless it is what the page shows already. vue: Nodes 2.0."""
        settings = SETTINGS | {"Comfy.Locale": locale, "Comfy.VueNodes.Enabled": vue}
        if settings != self._opened_with:
            self.server.request("/settings", settings)
            self.page.goto(self.server.url)
            self.page.wait_for_function(READY, timeout=120_000)
            self._opened_with = settings

    def load(self, file: Path) -> None:
        """Load a workflow file the way a drop onto the canvas does."""
        text = file.read_text(encoding="utf-8")
        self.page.evaluate(
            "([name, text]) => app.handleFile(new File([text], name, { type: 'application/json' }))", [file.name, text]
        )
        self.page.wait_for_function("id => app.rootGraph.id === id", arg=json.loads(text)["id"])
        self.page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")

    def missing_nodes(self) -> list[str]:
        """The types of nodes that the interface marks as broken or does not know."""
        return self.page.evaluate(MISSING)

    def toasts(self) -> list[str]:
        """The messages that the interface shows, such as an invalid workflow file."""
        return self.page.locator(".p-toast-message").all_inner_texts()

    def prompt(self) -> dict:
        """What the interface would send to the server."""
        return self.page.evaluate("async () => (await app.graphToPrompt()).output")

    def run(self, timeout: float = 120) -> None:
        """Press Run and wait for the end. Raises with the server's message where it fails."""
        self.page.evaluate(RUN, timeout * 1000)

    def look_at(self, type_: str, scale: float) -> None:
        """Move the canvas until the first node of this type is in the upper left."""
        self.page.evaluate(LOOK, [type_, scale])

    def screenshot(self, name: str) -> Path:
        """A picture of the page in out/, for people to look at."""
        path = PACK / "out" / name
        path.parent.mkdir(exist_ok=True)
        self.page.screenshot(path=path)
        return path


# Not for the whole session: while it runs, asyncio.run() fails everywhere else in this thread.
@pytest.fixture(scope="module")
def chromium():
    """A running headless browser; the test is skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    program = next(filter(None, map(shutil.which, CHROMIUMS)), None)
    if program is None:
        pytest.skip("no Chromium: `apt-get install chromium`, or install Google Chrome")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def interface(server: ComfyServer, chromium) -> Frontend:
    """A page of its own for the panels on nodes, since their tests need settings that the others must not meet."""
    context = chromium.new_context(viewport={"width": 1600, "height": 900})
    opened = Frontend(context.new_page(), server)
    # The interface catches what a listener throws, and warns.
    opened.page.on("console", lambda line: "Uncaught" in line.text and opened.broken.append(line.text))
    yield opened
    context.close()
    server.request("/settings", SETTINGS | {"Comfy.ColorPalette": "dark"})


@pytest.fixture(scope="module", params=[False, True], ids=["classic", "vue"])
def vue(request: pytest.FixtureRequest) -> bool:
    """Nodes 2.0 or the canvas; for the module, so that the page is loaded once for each."""
    return request.param


@pytest.fixture(scope="module")
def frontend(server: ComfyServer, chromium) -> Frontend:
    """One page for all tests of a file; each says with `open` how it needs it."""
    context = chromium.new_context(viewport={"width": 1600, "height": 900})
    yield Frontend(context.new_page(), server)
    context.close()
