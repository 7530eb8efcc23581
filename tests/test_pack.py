"""The pack as the host and the registry meet it: its papers, what is shipped, and that loading it changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent
NODES = {
    "ParaFBCachePatcher",
    "ParaFP8Quantize",
    "ParaFP8QuantizeCLIP",
    "ParaLoadQuantizedModel",
    "ParaCompileModel",
    "ParaContextParallelLauncher",
    "ParaParallelVAEDecode",
    "ParaAccelerationReport",
    "ParaDemoPrompt",
}
OPTIONAL = ("diffusers", "torchao", "bitsandbytes", "matplotlib", "accelerate")

if sys.version_info >= (3, 11):
    import tomllib
else:
    from pip._vendor import tomli as tomllib


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def loading(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What a fresh process sees that loads the pack under an odd folder name."""
    folder = tmp_path_factory.mktemp("loading") / "9 para (copy).v2"
    folder.symlink_to(ROOT, target_is_directory=True)
    command = [sys.executable, ROOT / "tests" / "loading_process.py", comfyui, folder, *OPTIONAL]
    ended = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]) | {"log": ended.stderr}


def archive(tmp_path: Path) -> list[str]:
    """The files that the registry would ship, packed by comfy-cli from a copy of this tree."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    for command in (["git", "init", "-q"], ["git", "add", "-A"], [*comfy_cli(), "node", "pack"]):
        run_quietly(command, tmp_path)
    return zipfile.ZipFile(tmp_path / "node.zip").namelist()


def comfy_cli() -> list[str]:
    pytest.importorskip("comfy_cli", reason="comfy-cli is missing: pip install comfy-cli")
    return [sys.executable, "-m", "comfy_cli", "--skip-prompt"]


def run_quietly(command: list[str], cwd: Path) -> str:
    """Run a tool with its settings and reports kept inside `cwd`; returns what it wrote."""
    environment = os.environ | {"HOME": str(cwd), "DO_NOT_TRACK": "1"}
    ended = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def test_dependencies_are_the_same_for_the_registry_and_the_manager(project):
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    assert project["project"]["dependencies"] == [line for line in lines if line]


def test_torch_is_never_asked_for(project):
    extras = project["project"]["optional-dependencies"].values()
    wanted = [*project["project"]["dependencies"], *(line for lines in extras for line in lines)]
    assert not [line for line in wanted if re.match(r"(torch(?!ao)|triton|flash)", line)]


def test_registry_entries_are_complete(project):
    name, comfy = project["project"]["name"], project["tool"]["comfy"]
    assert re.fullmatch(r"[A-Za-z](?:[._-]?[A-Za-z0-9])*", name) and len(name) < 100 and "comfyui" not in name.lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert comfy["PublisherId"] and comfy["DisplayName"] == "Para Accelerate"
    assert project["project"]["urls"]["Repository"].startswith("https://github.com/")
    # Beside WEB_DIRECTORY it would load every script twice wherever the folder is not called like the project.
    assert "web" not in comfy


def test_licence_is_apache_2(project):
    text = (ROOT / project["project"]["license"]["file"]).read_text()
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_comfy_cli_validates_the_pack_without_a_warning(tmp_path):
    for name in ("pyproject.toml", "__init__.py", "LICENSE", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("nodes", "para_core"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    assert "warning" not in run_quietly([*comfy_cli(), "node", "validate"], tmp_path).lower()


def test_registry_ships_the_models_and_no_tests(tmp_path):
    names = archive(tmp_path)
    for needed in (
        "__init__.py",
        "LICENSE",
        "requirements.txt",
        "pyproject.toml",
        "nodes/fbcache_patcher.py",
        "workflows/para_demo.json",
        "locales/zh/nodeDefs.json",
        "web/docs/ParaFBCachePatcher.md",
        "web/fbcache.js",
        "web/fbcache_panel.js",
        "web/fbcache_words.js",
        "web/node_panels.js",
        "web/compile.js",
        "web/compile_panel.js",
        "para_core/demo/models/diffusion_models/para_demo_flux.safetensors",
        "para_core/demo/models/vae/para_demo_taesd.safetensors",
    ):
        assert needed in names
    names.remove(".comfyignore")
    assert not [name for name in names if name.startswith(("tests/", ".", "out/", "Makefile"))]


def test_loads_under_any_folder_name(pack):
    assert set(pack.nodes) == NODES
    assert not hasattr(pack.module, "NODE_CLASS_MAPPINGS"), "the host would ignore comfy_entrypoint"


def test_loads_without_any_optional_package(loading):
    assert loading["loaded"], loading["log"]
    assert set(loading["nodes"]) == NODES


def test_loading_patches_nothing(loading):
    assert loading["num_watched"] > 10_000
    assert loading["changed"] == []


def test_stock_loaders_see_the_demo_models(pack):
    import folder_paths

    assert "para_demo_flux.safetensors" in folder_paths.get_filename_list("diffusion_models")
    assert "para_demo_taesd.safetensors" in folder_paths.get_filename_list("vae")
