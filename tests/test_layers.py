"""The arrows of design.md, read from the source: who may import whom."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).absolute().parent.parent
FILES = sorted([ROOT / "__init__.py", *(ROOT / "nodes").rglob("*.py"), *(ROOT / "para_core").rglob("*.py")])
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "folder_paths", "server", "execution", "node_helpers"}
HOST |= {"comfy_kitchen"}  # its quantized tensors

BELOW_ADAPTERS = {"para_core.CORE", "para_core.families", "para_core.adapters", "para_core.attention"}
BELOW_ADAPTERS |= {"para_core.parallel_vae", "para_core.workers"}

# The longest prefix decides. packages: what may be imported from outside; parts: what of the pack.
RULES = {
    "__init__.py": (set(), {"nodes"}),
    "nodes/": ({"torch", "PIL", "aiohttp"} | HOST, {"nodes", "para_core"}),
    "para_core": ({"torch"}, {"para_core.CORE", "para_core.families"}),
    "para_core/plot.py": ({"PIL"}, {"para_core.CORE"}),
    "para_core/quantization.py": ({"torch", "torchao", "bitsandbytes"}, {"para_core.CORE", "para_core.families"}),
    "para_core/sharded_operators.py": ({"torch"}, {"para_core.CORE"}),
    "para_core/quantization_scheme.py": ({"torch", "torchao", "bitsandbytes"}, {"para_core.CORE"}),
    "para_core/mesh_ranks.py": ({"torch"}, {"para_core.attention"}),
    "para_core/parallel_config.py": ({"torch"}, {"para_core.attention"}),
    "para_core/batch_rows.py": ({"torch"}, {"para_core.attention"}),
    "para_core/token_splits.py": ({"torch"}, {"para_core.CORE", "para_core.families", "para_core.attention"}),
    "para_core/families": ({"torch"}, {"para_core.families"}),
    "para_core/attention": ({"torch"}, {"para_core.attention", "para_core.families"}),
    "para_core/parallel_vae": ({"torch"}, {"para_core.parallel_vae"}),
    "para_core/workers": ({"torch"}, {"para_core.workers"}),
    "para_core/adapters": (set(), BELOW_ADAPTERS),
    "para_core/adapters/comfy_quantized_file.py": ({"torch", "safetensors"} | HOST, BELOW_ADAPTERS),
    "para_core/adapters/comfy": ({"torch"} | HOST, BELOW_ADAPTERS),
    "para_core/adapters/diffusers": ({"torch", "diffusers"}, BELOW_ADAPTERS),
    "para_core/demo": ({"torch", "diffusers", "numpy", "PIL", "safetensors", "tqdm", "aiohttp"}, {"para_core"}),
}
# Never from the other adapter: the nodes do not know diffusers, the demo does not know ComfyUI's modules.
FORBIDDEN = {"nodes/": "para_core.adapters.diffusers", "para_core/demo": "para_core.adapters.comfy"}


def module_name(file: Path) -> str:
    """Dotted name relative to the pack's root; the root's own __init__ is the empty name."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in FILES}


def imports(file: Path, *, only_at_import: bool = False) -> Iterator[tuple[bool, str]]:
    """(inside the pack?, dotted module) of every import; only_at_import leaves those inside functions out."""
    nodes = _outside_functions(ast.parse(file.read_text())) if only_at_import else ast.walk(ast.parse(file.read_text()))
    package = module_name(file).split(".") if file.name == "__init__.py" else module_name(file).split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((False, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield False, node.module
        elif isinstance(node, ast.ImportFrom):
            base = [part for part in package[: len(package) - node.level + 1] if part]
            base += node.module.split(".") if node.module else []
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield True, full if full in MODULES else ".".join(base)


def _outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield child
            yield from _outside_functions(child)


def rule(file: Path) -> tuple[set[str], set[str]]:
    name = file.relative_to(ROOT).as_posix()
    return RULES[max((prefix for prefix in RULES if name.startswith(prefix)), key=len)]


def part(module: str) -> set[str]:
    """The names under which a module of the pack may be allowed."""
    pieces = module.split(".")
    core = {"para_core.CORE"} if MODULES[module].parent == ROOT / "para_core" else set()
    return core | {".".join(pieces[:count]) for count in range(1, len(pieces) + 1)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_point_right_only(file):
    packages, parts = rule(file)
    name = file.relative_to(ROOT).as_posix()
    for inside, module in imports(file):
        if inside:
            assert part(module) & parts, f"{name} may not import {module} of the pack"
            forbidden = [end for start, end in FORBIDDEN.items() if name.startswith(start)]
            assert not any(module.startswith(end) for end in forbidden), f"{name} may not import {module}"
        else:
            top = module.split(".")[0]
            assert top != "para_core", f"{name} imports {module} by its absolute name; the folder's is not ours"
            assert top in sys.stdlib_module_names | packages, f"{name} may not import {module}"


def test_no_import_goes_in_a_circle():
    arrows = {
        name: {module for inside, module in imports(file, only_at_import=True) if inside and module != name}
        for name, file in MODULES.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import circle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for target in sorted(arrows.get(name, ())):
                visit(target, (*path, name))
            done.add(name)

    for name in arrows:
        visit(name, ())
