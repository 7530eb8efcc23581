"""Ranks that are lost, stopped or out of memory while a real server samples on them, and cancels."""

from __future__ import annotations

import functools
import os
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from parallel_prompts import (
    LONG,
    StepTimes,
    key_of,
    latent_of,
    ranks,
    report_of,
    reported,
    spread,
    started,
)

from para_core.demo.host import ComfyServer, HostError

pytestmark = pytest.mark.usefixtures("no_ranks_afterwards")


@pytest.fixture(scope="module")
def undisturbed(server):
    """cache -> what the long workflow with or without the cache gives."""
    return functools.cache(lambda cache: latent_of(server, server.run_workflow(long_run(server, cache))))


def long_run(server: ComfyServer, cache: bool, **settings) -> dict:
    return spread(server, steps=LONG, seed=10, cache=cache, **settings)


# The settings say in other words what is chosen anyway: the host would not run the same prompt twice.
@pytest.mark.parametrize(
    ("victim", "signal_", "cache", "settings"),
    [
        (0, signal.SIGKILL, False, {"batch_parallel": "off"}),
        (1, signal.SIGKILL, True, {"batch_parallel": "off"}),
        (1, signal.SIGSTOP, False, {"ulysses_degree": 2}),
    ],
    ids=["first", "second, cache", "hanging"],
)
def test_a_lost_rank_costs_time_and_not_the_picture(server, undisturbed, victim, signal_, cache, settings):
    expected, steps = undisturbed(cache), StepTimes()
    future, pool = started(server, reported(long_run(server, cache, **settings)), steps)
    with pool:
        killed = time.monotonic()
        os.kill(ranks(server)[victim]["pid"], signal_)
        assert torch.equal(latent_of(server, future.result()), expected)
        assert "Restarts during the run: 1; what was lost" in report_of(future.result())
    noticed = 20 if signal_ == signal.SIGSTOP else 0  # heartbeat_timeout
    # From the loss until the new ranks have made the step, on a machine that others use as much as it takes then.
    assert steps.longest(since=killed) - noticed < 15 * max(1.0, os.getloadavg()[0] / os.cpu_count())
    assert ("no sign of life" in ranks(server)[victim]["error"]) == (signal_ == signal.SIGSTOP)


def test_three_kills_in_a_row_are_one_error_and_the_next_prompt_works(server):
    server.run_workflow(spread(server, seed=12))  # the processes are there: the next run is soon among its steps
    future, pool = started(server, spread(server, steps=LONG, seed=11, cache=False))
    time.sleep(1)
    killed = set()
    with pool:
        while not future.done():
            for rank in ranks(server):
                if rank["rank"] == 1 and rank["pid"] and rank["pid"] not in killed:
                    time.sleep(0.5)  # let it come up
                    os.kill(rank["pid"], signal.SIGKILL)
                    killed.add(rank["pid"])
            time.sleep(0.05)
        with pytest.raises(HostError, match=r"^KSampler: rank 1 was lost: SIGKILL(\n|$)") as error:
            future.result()
    assert len(killed) == 3
    assert "Traceback" not in str(error.value)
    assert server.run_workflow(spread(server, seed=13)).images


def test_a_rank_out_of_memory_is_one_error_without_another_try(server):
    """The limit goes with the process: were anything tried again on new ones, the run would succeed."""
    server.run_workflow(spread(server, seed=14))
    pid = ranks(server)[1]["pid"]
    limit = _virtual_memory(pid) + 8 * 2**20
    resource.prlimit(pid, resource.RLIMIT_AS, (limit, limit))
    prompt = spread(server, seed=15, cache=False)
    prompt[key_of(prompt, "EmptySD3LatentImage")]["inputs"] |= {"width": 1024, "height": 1024}
    begun = time.monotonic()
    with pytest.raises(HostError, match=r"^KSampler: rank 1 raised in forward: .*allocate.*\n") as error:
        server.run_workflow(prompt)
    assert time.monotonic() - begun < 30
    assert str(error.value).count("Traceback") == 1 and "comfy_rank" in str(error.value)
    assert server.run_workflow(spread(server, seed=16)).images


def _virtual_memory(pid: int) -> int:
    with open(f"/proc/{pid}/statm") as figures:
        return int(figures.read().split()[0]) * resource.getpagesize()


def test_cancel_takes_effect_at_once_and_leaves_the_processes(server):
    server.free()
    future, pool = started(server, spread(server, steps=LONG, seed=20, cache=False))
    with pool:
        pids, start = [rank["pid"] for rank in ranks(server)], time.monotonic()
        server.request("/interrupt", {})
        with pytest.raises(HostError, match="interrupted at KSampler"):
            future.result()
        assert time.monotonic() - start < 2.0
    server.run_workflow(spread(server, seed=21))
    assert [rank["pid"] for rank in ranks(server)] == pids


def test_stop_while_the_ranks_start(server):
    server.request("/para/ranks/stop", {})
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(server.run_workflow, spread(server, steps=4, seed=60))
        end = time.monotonic() + 60
        while not (shown := ranks(server)):
            assert time.monotonic() < end and not future.done()
        assert [rank["state"] for rank in shown] == ["starting", "starting"]
        stopped = time.monotonic()
        server.request("/para/ranks/stop", {})
        assert ranks(server) == []
        with pytest.raises(HostError, match="the group is closed"):
            future.result()
        assert time.monotonic() - stopped < 3
    assert server.run_workflow(spread(server, steps=4, seed=61)).images
