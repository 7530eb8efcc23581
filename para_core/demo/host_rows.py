"""The demo's rows from a real ComfyUI: the shipped demo workflow with its patcher bypassed, and as it is."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from ..cache_report import RunReport
from .host import HOW_TO_GET_ONE, PACK, ComfyServer, find_comfyui
from .table import Row, figures
from .workflow import BYPASSED, to_api

WORKFLOW = PACK / "workflows" / "para_demo.json"
NUM_SEEDS = 4


def host_rows(out: Path) -> tuple[str | None, list[dict[str, object]]]:
    """The version of the ComfyUI that was found and the figures of the two rows; (None, []) where there is none.

    One picture of each row is written to `out`.
    """
    comfyui = find_comfyui()
    if comfyui is None:
        sys.stderr.write(f"no ComfyUI row: {HOW_TO_GET_ONE}\n")
        return None, []
    shipped = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    bypassed = copy.deepcopy(shipped)
    for node in bypassed["nodes"]:
        if node["type"] == "ParaFBCachePatcher":
            node["mode"] = BYPASSED
    sys.stderr.write("running the demo workflow in ComfyUI\n")
    with ComfyServer(comfyui) as server:
        version = server.request("/system_stats")["system"]["comfyui_version"]
        rows = [
            (Row(f"ComfyUI {version}: demo workflow, patcher bypassed"), bypassed),
            (Row(f"ComfyUI {version}: demo workflow"), shipped),
        ]
        run_workflow(server, Row("warm-up"), shipped, seed=NUM_SEEDS)
        for seed in range(NUM_SEEDS):
            for row, workflow in rows:
                run_workflow(server, row, workflow, seed)
    prompt = next(node["widgets_values"][0] for node in shipped["nodes"] if node["type"] == "ParaDemoPrompt")
    result = figures([row for row, _ in rows], [prompt] * NUM_SEEDS)
    for (row, _), figure, name in zip(rows, result, ("demo_comfyui_bypassed.png", "demo_comfyui.png"), strict=True):
        Image.fromarray((row.pictures[0].numpy() * 255).round().astype(np.uint8)).save(out / name)
        figure["image"] = name
    return version, result


def run_workflow(server: ComfyServer, row: Row, workflow: dict, seed: int) -> None:
    """Run the workflow with this seed, its final latent saved too, and put what came out into `row`.

    Without the report node, whose drawing is not the model's time.
    """
    prompt = to_api(workflow, server.object_info())
    prompt = {key: node for key, node in prompt.items() if node["class_type"] != "ParaAccelerationReport"}
    sampler = next(key for key, node in prompt.items() if node["class_type"] == "KSampler")
    prompt[sampler]["inputs"]["seed"] = seed
    prompt["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "para"}}
    run = server.run_workflow(prompt)
    row.seconds.append(run.seconds)
    (saved,) = run.outputs["latent"]["latents"]
    latent = server.base_directory / saved["type"] / saved["subfolder"] / saved["filename"]
    row.latents.append(load_file(latent)["latent_tensor"])
    picture = torch.from_numpy(np.array(Image.open(run.images[0]).convert("RGB"))).float()[None] / 255
    row.pictures = picture if row.pictures is None else torch.cat((row.pictures, picture))
    reports = map(RunReport.from_dict, run.events_of("para.fbcache"))
    row.reports += [report for report in reports if report.finished]
