"""One real ComfyUI server for the whole session."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from para_core.demo.host import ComfyServer

# What a person has who closed the first-run dialogs; the validation shows a broken workflow file as a toast.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Locale": "en",
    "Comfy.VueNodes.Enabled": False,
    "Comfy.Validation.Workflows": True,
    "Comfy.Workflow.Persist": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
}


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> ComfyServer:
    """A server with the pack in its custom_nodes; starting it fails where the pack does not load."""
    base = tmp_path_factory.mktemp("server")
    settings = base / "user" / "default" / "comfy.settings.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps(SETTINGS))
    with ComfyServer(comfyui, base_directory=base) as running:
        yield running


@pytest.fixture(scope="module")
def no_ranks_afterwards(server: ComfyServer):
    yield
    server.request("/para/ranks/stop", {})
    assert not server.request("/para/ranks")
