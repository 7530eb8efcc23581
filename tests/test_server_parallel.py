"""The Context-Parallel Launcher and Parallel VAE Decode through a real server."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parallel_prompts import (
    WORKFLOW,
    alone,
    key_of,
    latent_of,
    ranks,
    report_of,
    reported,
    spread,
)
from test_server import demo, pixels
from traces import Traces
from two_machines import documented_command, two_agents

from para_core.demo.host import PACK, ComfyServer, HostError
from para_core.demo.workflow import to_api

HELP, LAUNCHER_ID = PACK / "web" / "docs", "ParaContextParallelLauncher"
DECODER = {"num_devices": 2, "devices": "cpu", "backend": "auto", "attach_to": ""}


pytestmark = pytest.mark.usefixtures("no_ranks_afterwards")


def test_the_picture_is_that_of_one_device_with_the_same_decisions(server):
    prompt = spread(server)
    together, single = server.run_workflow(prompt), server.run_workflow(alone(prompt))
    difference = latent_of(server, together) - latent_of(server, single)
    assert difference.norm() <= 1e-4 * latent_of(server, single).norm()
    assert np.abs(pixels(together.images[0]).astype(int) - pixels(single.images[0])).max() <= 1
    here, there = (run.events_of("para.fbcache")[-1] for run in (single, together))
    assert there["num_reused_calls"] == here["num_reused_calls"] > 0
    assert there["num_block_calls"] == here["num_block_calls"]


def test_report_behind_the_launcher_tells_of_its_ranks(server):
    fbcache, parallel = report_of(server.run_workflow(reported(spread(server, seed=4)))).split("\n\n")
    assert "of 28 steps reused" in fbcache
    first, *memory, restarts = parallel.splitlines()
    assert re.fullmatch("Context-Parallel Launcher, 2 ranks: batch 1 x ring [12] x Ulysses [12]", first)
    sizes = [int(re.fullmatch(rf"Rank {rank} \(cpu\): (\d+) MiB", line)[1]) for rank, line in enumerate(memory)]
    assert len(sizes) == 2 and all(100 < size < 4096 for size in sizes), "torch and the host alone need 100 MiB"
    assert restarts == "Restarts during the run: none"


def test_shipped_workflow_runs_with_one_device_and_with_two(server):
    shipped = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    server.request("/para/ranks/stop", {})
    single = server.run_workflow(shipped)
    notices = [said["text"] for said in single.events_of("progress_text") if said["text"].startswith("One device")]
    assert len(notices) == (2 if torch.cuda.device_count() < 2 else 0), "of the launcher and of the decoder"
    prompt = to_api(shipped, server.object_info())
    # The decoder, which is left as it is, takes the processes that are there.
    prompt[key_of(prompt, LAUNCHER_ID)]["inputs"] |= {"num_devices": 2, "devices": "cpu"}
    together = server.run_workflow(prompt)
    said = [entry["text"] for entry in together.events_of("progress_text")]
    assert said == [event["summary"] for event in together.events_of("para.parallel")]
    assert said[0].startswith("2 ranks: batch 1 x ring 1") and said[-1] == "Decoded on 2 ranks."
    assert {event["num_ranks"] for event in together.events_of("para.parallel")} == {2}
    assert np.abs(pixels(together.images[0]).astype(int) - pixels(single.images[0])).max() <= 1


def with_a_second_model(prompt: dict) -> dict:
    """The picture goes on with another model on the same ranks, as Wan 2.2's does; its latent is the one saved."""
    loader, sampler = key_of(prompt, "UNETLoader"), key_of(prompt, "KSampler")
    other = {**prompt[loader]["inputs"], "weight_dtype": "fp8_e4m3fn"}
    inputs = {**prompt[sampler]["inputs"], "model": ["launcher 2", 0], "latent_image": [sampler, 0], "denoise": 0.5}
    return prompt | {
        "loader 2": {"class_type": "UNETLoader", "inputs": other},
        "launcher 2": {**prompt["launcher"], "inputs": {**prompt["launcher"]["inputs"], "model": ["loader 2", 0]}},
        "sampler 2": {"class_type": "KSampler", "inputs": inputs},
        "latent": {**prompt["latent"], "inputs": {**prompt["latent"]["inputs"], "samples": ["sampler 2", 0]}},
    }


@pytest.mark.parametrize("models", [lambda prompt: prompt, with_a_second_model], ids=["one model", "two models"])
def test_a_second_prompt_starts_no_process_and_loads_nothing(server, models):
    first = latent_of(server, server.run_workflow(models(spread(server, seed=2))))
    before = ranks(server)
    read = sum(_bytes_read(rank["pid"]) for rank in before)
    assert not torch.equal(latent_of(server, server.run_workflow(models(spread(server, seed=3)))), first)
    assert [rank["pid"] for rank in ranks(server)] == [rank["pid"] for rank in before]
    assert sum(_bytes_read(rank["pid"]) for rank in before) - read < 4 * 2**20, "the weights alone are 28 MB"


def _bytes_read(pid: int) -> int:
    with open(f"/proc/{pid}/io") as figures:
        return int(next(line for line in figures if line.startswith("rchar")).split()[1])


def test_what_the_ranks_cannot_do_is_refused_in_one_line(server):
    prompt = spread(server)
    prompt["easy"] = {
        "class_type": "EasyCache",
        "inputs": {
            "model": ["launcher", 0],
            "reuse_threshold": 0.2,
            "start_percent": 0.1,
            "end_percent": 0.9,
            "verbose": False,
        },
    }
    prompt[key_of(prompt, "KSampler")]["inputs"]["model"] = ["easy", 0]
    with pytest.raises(HostError, match=r"a node wraps the diffusion model \(easycache\).*Remove that node"):
        server.run_workflow(prompt)
    with pytest.raises(HostError, match=r"ulysses_degree 2 does not divide|num_devices is 3, but devices names 2"):
        server.run_workflow(spread(server, num_devices=3, devices="cpu, cpu"))


def test_parallel_decode_gives_the_same_picture(server):
    prompt = demo(server, KSampler={"seed": 30})
    decoder = prompt[key_of(prompt, "VAEDecode")]
    single = server.run_workflow(prompt)
    decoder["class_type"], decoder["inputs"] = "ParaParallelVAEDecode", decoder["inputs"] | DECODER
    together = server.run_workflow(prompt)
    assert np.abs(pixels(together.images[0]).astype(int) - pixels(single.images[0])).max() <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux")
def test_a_group_on_two_machines_started_as_the_help_pages_say(server, tmp_path):
    given = {"HOST:29400": "HOST:PORT", "--nproc-per-node=4": "--nproc-per-node=1"}
    english = documented_command(HELP / f"{LAUNCHER_ID}.md", **given)
    assert documented_command(HELP / LAUNCHER_ID / "zh.md", **given) == english
    with two_agents(english, tmp_path / "para.sock", {"PYTHONPATH": str(PACK)}, server.comfyui) as address:
        for seed in (40, 41):
            prompt = spread(server, steps=8, seed=seed, cache=False, devices="", num_devices=0, attach_to=str(address))
            together, single = server.run_workflow(prompt), server.run_workflow(alone(prompt))
            expected = latent_of(server, single)
            assert (latent_of(server, together) - expected).norm() <= 1e-6 * expected.norm()
            assert any("2 ranks" in said["text"] for said in together.events_of("progress_text"))
        server.request("/para/ranks/stop", {})


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT], ids=lambda stop: stop.name)
def test_a_server_that_is_stopped_leaves_nothing(comfyui, stop):
    with ComfyServer(comfyui) as other:
        other.run_workflow(spread(other, steps=2, cache=False))
        (group,) = other.request("/para/ranks")
        traces = Traces(Path(group["address"]).parent, other._process.pid)
        assert len(traces.processes) == 1 + 1 + 2, "server, agent and ranks"
        other._process.send_signal(stop)
        assert traces.left(10) == []


# Like the package for GPUs that the host's --use-sage-attention asks for; its results tell it from other attention.
SAGE = """
import torch.nn.functional as F

def sageattn(q, k, v, tensor_layout="HND", attn_mask=None, sm_scale=None, **_):
    q, k, v = (x.transpose(1, 2) if tensor_layout == "NHD" else x for x in (q, k, v))
    out = 1.05 * F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, scale=sm_scale)
    return out.transpose(1, 2) if tensor_layout == "NHD" else out
"""


def test_two_servers_side_by_side_of_which_one_has_another_attention_and_is_killed(
    comfyui, server, tmp_path, monkeypatch
):
    (tmp_path / "sageattention.py").write_text(SAGE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    arguments = ("--cpu", "--use-sage-attention", "--preview-method", "latent2rgb")
    with ComfyServer(comfyui, arguments=arguments) as other:
        prompt = spread(other, steps=4, cache=False)
        with pytest.raises(HostError, match='attention "sage" returns no log-sum-exp.*or a mesh without a ring'):
            other.run_workflow(spread(other, ring_degree=2))
        runs = [other.run_workflow(found) for found in (prompt, alone(prompt))]
        previews = [len(run.events_of("preview")) for run in runs]
        assert previews[0] == previews[1] > 0
        together, single = (latent_of(other, run) for run in runs)
        usual = latent_of(server, server.run_workflow(alone(prompt)))
        assert (together - single).norm() <= 1e-5 * single.norm() < 1e-3 * (usual - single).norm()
        server.run_workflow(spread(server, seed=40))
        assert not {rank["pid"] for rank in ranks(other)} & {rank["pid"] for rank in ranks(server)}
        (group,) = other.request("/para/ranks")
        traces = Traces(Path(group["address"]).parent, other._process.pid)
        os.kill(other._process.pid, signal.SIGKILL)
        assert traces.left(10) == []
    assert server.run_workflow(spread(server, seed=41)).images
