"""A fresh process that loads the pack: python loading_process.py COMFYUI FOLDER [packages to hide].

Prints JSON: the nodes that came, and every callable of the host's modules and of torch's that changed.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import sys
from types import ModuleType

WATCHED = {"execution", "nodes", "server", "latent_preview", "folder_paths", "node_helpers", "torch"}


def boot(comfyui: str) -> None:
    """Import what a running ComfyUI has imported before it comes to custom nodes."""
    sys.argv[1:] = []
    sys.path.insert(0, comfyui)
    from comfy.cli_args import args

    args.cpu = True
    args.base_directory = os.getcwd()
    for name in ("execution", "server", "comfy.ldm.flux.model", "comfy.ldm.wan.model"):
        importlib.import_module(name)


def snapshot(modules: list[ModuleType]) -> dict[str, object]:
    """Every function, class and method of the modules, by dotted name."""
    found = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if callable(value):
                found[f"{module.__name__}.{name}"] = value
            if isinstance(value, type) and value.__module__ == module.__name__:
                for key, entry in vars(value).items():
                    if callable(entry) or isinstance(entry, (staticmethod, classmethod, property)):
                        found[f"{module.__name__}.{name}.{key}"] = entry
    return found


def main(comfyui: str, folder: str, *blocked: str) -> None:
    for name in blocked:
        sys.modules[name] = None
    boot(comfyui)
    import nodes

    loaded = [(name.split(".")[0], module) for name, module in sorted(sys.modules.items()) if module is not None]
    modules = [module for top, module in loaded if top in WATCHED or top.startswith("comfy")]
    core, before = set(nodes.NODE_CLASS_MAPPINGS), snapshot(modules)
    success = asyncio.run(nodes.load_custom_node(folder, ignore=core))
    after = snapshot(modules)
    result = {
        "loaded": success,
        "nodes": sorted(set(nodes.NODE_CLASS_MAPPINGS) - core),
        "num_watched": len(before),
        "changed": [name for name, value in before.items() if after.get(name) is not value],
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
