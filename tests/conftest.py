"""What all tests share: the fixtures_* modules, the marks that follow from them, and the closing lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent
# At the end: `nodes` and `server` must stay ComfyUI's.
sys.path.append(str(ROOT))
pytest_plugins = ["fixtures_host", "fixtures_server", "fixtures_browser", "fixtures_ranks", "fixtures_in_process"]
pytest_plugins += ["fixtures_dynamic_vram"]

KINDS = {"browser": {"chromium"}, "host": {"comfyui"}}


class PackRootIsNoPackage:
    """Keeps pytest from importing the pack's __init__.py, which only ComfyUI can import."""

    @staticmethod
    def pytest_collect_directory(path: Path, parent: pytest.Collector) -> pytest.Dir | None:
        return pytest.Dir.from_parent(parent, path=path) if path == ROOT else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(PackRootIsNoPackage())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for kind, fixtures in KINDS.items():
            if fixtures & set(item.fixturenames):
                item.add_marker(kind)
                break


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests really met the host and the browser, and why others did not."""
    stats = terminalreporter.stats
    terminalreporter.section("host and browser")
    for kind in KINDS:
        ran = sum(kind in report.keywords for outcome in ("passed", "failed") for report in stats.get(outcome, []))
        skipped = [report for report in stats.get("skipped", []) if kind in report.keywords]
        reasons = sorted({report.longrepr[2].removeprefix("Skipped: ") for report in skipped})
        why = f" ({'; '.join(reasons)})" if reasons else ""
        terminalreporter.write_line(f"{kind} tests: {ran} ran, {len(skipped)} skipped{why}")
