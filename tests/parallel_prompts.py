"""The demo workflow with a Context-Parallel Launcher, and what a server tells of its ranks."""

from __future__ import annotations

import itertools
import time
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from safetensors.torch import load_file
from test_server import SHIPPED, demo

from para_core.demo.host import ComfyServer

WORKFLOW = SHIPPED.with_name("para_demo_parallel.json")

LAUNCHER = {
    "num_devices": 2, "devices": "cpu", "ring_degree": 0, "ulysses_degree": 0, "batch_parallel": "auto",
    "backend": "auto", "attach_to": "", "keep_loaded": True,
}  # fmt: skip

LONG = 150  # steps: long enough to get at a run while it goes on


def key_of(prompt: dict, class_type: str) -> str:
    return next(key for key, node in prompt.items() if node["class_type"] == class_type)


def spread(server: ComfyServer, *, steps: int = 28, seed: int = 1, cache: bool = True, **settings) -> dict:
    """The demo workflow on two processes, the launcher in front of the patcher; its latent is saved too."""
    prompt = demo(server, KSampler={"steps": steps, "seed": seed})
    del prompt[key_of(prompt, "ParaAccelerationReport")]
    loader, patcher, sampler = (key_of(prompt, name) for name in ("UNETLoader", "ParaFBCachePatcher", "KSampler"))
    inputs = LAUNCHER | settings | {"model": [loader, 0]}
    prompt["launcher"] = {"class_type": "ParaContextParallelLauncher", "inputs": inputs}
    prompt[patcher]["inputs"]["model"] = ["launcher", 0]
    if not cache:
        prompt[sampler]["inputs"]["model"] = ["launcher", 0]
    prompt["latent"] = {"class_type": "SaveLatent", "inputs": {"samples": [sampler, 0], "filename_prefix": "spread"}}
    return prompt


def alone(prompt: dict) -> dict:
    """The same workflow without the launcher."""
    (source,) = (node["inputs"]["model"] for node in prompt.values() if "Launcher" in node["class_type"])
    left = {key: node for key, node in prompt.items() if key != "launcher"}
    return {
        key: {**node, "inputs": {n: source if v == ["launcher", 0] else v for n, v in node["inputs"].items()}}
        for key, node in left.items()
    }


def reported(prompt: dict) -> dict:
    """The same with an Acceleration Report behind the sampler."""
    sampler = key_of(prompt, "KSampler")
    inputs = {"model": prompt[sampler]["inputs"]["model"], "after": [sampler, 0]}
    return prompt | {"report": {"class_type": "ParaAccelerationReport", "inputs": inputs}}


def report_of(run) -> str:
    return run.outputs["report"]["text"][0]


def latent_of(server: ComfyServer, run) -> torch.Tensor:
    (saved,) = run.outputs["latent"]["latents"]
    return load_file(server.base_directory / saved["type"] / saved["subfolder"] / saved["filename"])["latent_tensor"]


def ranks(server: ComfyServer) -> list[dict]:
    groups = server.request("/para/ranks")
    return groups[0]["ranks"] if groups else []


class StepTimes(list):
    """As a listener: when the sampler has made a step."""

    def __call__(self, type_: str, data: dict) -> None:
        if type_ == "progress":
            self.append(time.monotonic())

    def longest(self, since: float) -> float:
        """Seconds that the longest step took that was made after `since`."""
        return max(end - begun for begun, end in itertools.pairwise(self) if end > since)


def started(server: ComfyServer, prompt: dict, listener: StepTimes | None = None) -> tuple[Future, ThreadPoolExecutor]:
    """Queue it, and return when the ranks are busy with it."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(server.run_workflow, prompt, listener=listener)
    end = time.monotonic() + 120
    while not any(rank["state"] == "busy" for rank in ranks(server)):
        assert time.monotonic() < end and not future.done(), future.result() if future.done() else "never busy"
        time.sleep(0.05)
    time.sleep(0.7)
    return future, pool
