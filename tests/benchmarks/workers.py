"""python -m tests.benchmarks.workers: what a group of ranks costs, on this machine's CPU.

Seconds until it is ready; what a call costs beyond the service's own work, with an 18.5 MB latent in and out and with
nothing; the memory (PSS: shared pages counted once) that a checkpoint adds in all processes, over its size.
Goals: 15 s, 10 ms, 1.15. Wall times need an idle machine; beside them is what copying the latent four times costs.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from para_core.workers import GroupConfig, Shared, WorkerContext, WorkerGroup

LATENT_BYTES = 18_500_000
MEBIBYTE = 1 << 20
logger = logging.getLogger(__name__)


class Weights:
    """The ranks' side: hands back what came, and holds weights."""

    borrowing = ("echo",)  # as a model call does

    def __init__(self, context: WorkerContext) -> None:
        self.weights: list[torch.Tensor] = []

    def echo(self, payload: object) -> object:
        return payload

    def hold(self, payload: list[torch.Tensor]) -> float:
        """Reads every byte, so that every page is in memory."""
        self.weights = payload
        return float(sum(tensor.sum(dtype=torch.float64) for tensor in payload))


def config(num_ranks: int) -> GroupConfig:
    return GroupConfig(("cpu",) * num_ranks, "tests.benchmarks.workers:Weights")


def processes(group: WorkerGroup) -> list[int]:
    """This one, the agent and the ranks."""
    ranks = [rank["pid"] for rank in group.state()["ranks"]]
    agent = int(Path(f"/proc/{ranks[0]}/stat").read_text().rpartition(")")[2].split()[1])
    return [os.getpid(), agent, *ranks]


def pss(pids: Iterable[int], kinds: tuple[str, ...] = ("Pss:",)) -> int:
    """Bytes; a page that n processes map counts 1/n in each. kinds: lines of the kernel's table."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(kinds)) * 1024
    return total


def added_by_checkpoint(group: WorkerGroup, size: int) -> float:
    """What `size` bytes of weights add in all processes, over size. The client keeps none of them."""
    group.call("hold", Shared([torch.ones(1024)]))  # whatever a first call costs
    kinds = "Pss_Anon:", "Pss_Shmem:"  # not files: libraries count more when other processes that use them end
    before = pss(processes(group), kinds)
    weights = [torch.ones(size // 8, dtype=torch.bfloat16) for _ in range(4)]  # so large that free gives them back
    assert group.call("hold", Shared(weights)) == size // 8 * 4
    del weights
    return (pss(processes(group), kinds) - before) / size


def milliseconds(work: Callable[[], object], rounds: int) -> list[float]:
    times = []
    for _ in range(rounds + 3):
        begun = time.perf_counter()
        work()
        times.append((time.perf_counter() - begun) * 1e3)
    return times[3:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--checkpoint", type=int, default=1024, help="MiB")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    begun = time.perf_counter()
    group = WorkerGroup.start(config(args.ranks))
    logger.info("%d ranks ready after %.1f s", args.ranks, time.perf_counter() - begun)
    latent, target = torch.randn(LATENT_BYTES // 4), torch.empty(LATENT_BYTES // 4)
    for name, work in {
        "call with the latent": lambda: group.call("echo", latent),
        "call with nothing": lambda: group.call("echo"),
        "four copies of the latent": lambda: [target.copy_(latent) for _ in range(4)],
    }.items():
        times = milliseconds(work, args.rounds)
        logger.info("%-26s median %.2f ms, least %.2f ms", name, statistics.median(times), min(times))
    ratio = added_by_checkpoint(group, args.checkpoint * MEBIBYTE)
    logger.info("%d MiB of weights add %.3f times their size in all processes", args.checkpoint, ratio)
    group.close()


if __name__ == "__main__":
    main()
