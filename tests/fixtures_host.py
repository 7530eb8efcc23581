"""ComfyUI inside the test process: its modules on the path, on the CPU, and the pack loaded by its own loader."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch

from para_core.demo.host import HOW_TO_GET_ONE, PACK, find_comfyui


@dataclass(frozen=True)
class Pack:
    """The pack as ComfyUI loaded it. nodes: node id to class."""

    module: ModuleType
    nodes: dict[str, type]


@pytest.fixture(scope="session")
def comfyui() -> Path:
    """The ComfyUI checkout; the test is skipped where there is none."""
    found = find_comfyui()
    if found is None:
        pytest.skip(HOW_TO_GET_ONE)
    return found


@pytest.fixture(scope="session")
def comfy(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From here on `import comfy...`, `import nodes` and so on are ComfyUI's; the checkout itself stays clean."""
    boot_comfyui(comfyui, tmp_path_factory.mktemp("comfyui"))
    return comfyui


def boot_comfyui(comfyui: Path, base_directory: Path) -> None:
    """Make this process one in which ComfyUI's modules can be imported."""
    # In front of everything: the pack's own folder has a `nodes` too.
    sys.path.insert(0, str(comfyui))
    from comfy.cli_args import args

    # Before model_management is imported: without it that import looks for a GPU and fails.
    args.cpu = True
    args.use_pytorch_cross_attention = True
    args.base_directory = str(base_directory)
    import comfy.model_management  # noqa: F401

    # On models this small further threads only wait for each other.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def inference_mode(request: pytest.FixtureRequest):
    """ComfyUI runs every node in inference mode; so do the tests that use it."""
    if "comfy" not in request.fixturenames:
        yield
        return
    with torch.inference_mode():
        yield


@pytest.fixture(scope="session")
def pack(comfy: Path, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """The pack, loaded by ComfyUI's own loader from a folder whose name is no module name."""
    import nodes

    folder = tmp_path_factory.mktemp("custom_nodes") / "ComfyUI Para-Test.x"
    folder.symlink_to(PACK, target_is_directory=True)
    core = set(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(str(folder), ignore=core)), "ComfyUI's log above says why"
    own = {name: found for name, found in nodes.NODE_CLASS_MAPPINGS.items() if name not in core}
    return Pack(sys.modules[str(folder).replace(".", "_x_")], own)
