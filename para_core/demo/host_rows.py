"""The demo's rows from a real ComfyUI: the demo workflow with its patcher bypassed, as shipped, and on two ranks."""

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
PICTURES = ("demo_comfyui_bypassed.png", "demo_comfyui.png", "demo_comfyui_parallel.png")
LAUNCHER = {
    "num_devices": 2, "devices": "cpu, cpu", "ring_degree": 0, "ulysses_degree": 0, "batch_parallel": "auto",
    "backend": "auto", "attach_to": "", "keep_loaded": True,
}  # fmt: skip


def host_rows(out: Path) -> tuple[str | None, list[dict[str, object]]]:
    """The version of the ComfyUI that was found and the figures of the rows; (None, []) where there is none.

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
        prompts = [prompt_of(server, workflow) for workflow in (bypassed, shipped)]
        prompts.append(on_two_ranks(prompts[1]))
        rows = [
            Row(f"ComfyUI {version}: demo workflow, patcher bypassed"),
            Row(f"ComfyUI {version}: demo workflow"),
            Row(f"ComfyUI {version}: demo workflow + context parallel", num_ranks=2),
        ]
        for prompt in prompts[1:]:
            run_workflow(server, Row("warm-up"), prompt, seed=NUM_SEEDS)
        for seed in range(NUM_SEEDS):
            for row, prompt in zip(rows, prompts, strict=True):
                run_workflow(server, row, prompt, seed)
    words = next(node["widgets_values"][0] for node in shipped["nodes"] if node["type"] == "ParaDemoPrompt")
    result = figures(rows, [words] * NUM_SEEDS)
    for row, figure, name in zip(rows, result, PICTURES, strict=True):
        Image.fromarray((row.pictures[0].numpy() * 255).round().astype(np.uint8)).save(out / name)
        figure["image"] = name
    return version, result


def prompt_of(server: ComfyServer, workflow: dict) -> dict:
    """The workflow in the API's format, its final latent saved too; without the report node, whose drawing is not the
    model's time."""
    prompt = to_api(workflow, server.object_info())
    prompt = {key: node for key, node in prompt.items() if node["class_type"] != "ParaAccelerationReport"}
    prompt["latent"] = {
        "class_type": "SaveLatent",
        "inputs": {"samples": [key_of(prompt, "KSampler"), 0], "filename_prefix": "para"},
    }
    return prompt


def on_two_ranks(prompt: dict) -> dict:
    """The same prompt with the Context-Parallel Launcher in front of the patcher, on two processes of this CPU."""
    prompt, patcher = copy.deepcopy(prompt), key_of(prompt, "ParaFBCachePatcher")
    inputs = LAUNCHER | {"model": prompt[patcher]["inputs"]["model"]}
    prompt["launcher"] = {"class_type": "ParaContextParallelLauncher", "inputs": inputs}
    prompt[patcher]["inputs"]["model"] = ["launcher", 0]
    return prompt


def key_of(prompt: dict, class_type: str) -> str:
    return next(key for key, node in prompt.items() if node["class_type"] == class_type)


def run_workflow(server: ComfyServer, row: Row, prompt: dict, seed: int) -> None:
    """Run the prompt with this seed, and put what came out into `row`."""
    prompt[key_of(prompt, "KSampler")]["inputs"]["seed"] = seed
    run = server.run_workflow(prompt)
    row.seconds.append(run.seconds)
    (saved,) = run.outputs["latent"]["latents"]
    latent = server.base_directory / saved["type"] / saved["subfolder"] / saved["filename"]
    row.latents.append(load_file(latent)["latent_tensor"])
    picture = torch.from_numpy(np.array(Image.open(run.images[0]).convert("RGB"))).float()[None] / 255
    row.pictures = picture if row.pictures is None else torch.cat((row.pictures, picture))
    reports = map(RunReport.from_dict, run.events_of("para.fbcache"))
    row.reports += [report for report in reports if report.finished]
