"""Cases for the tests of gloo_ranks.py itself."""

from __future__ import annotations

import os
import signal
import sys

import torch
import torch.distributed as dist


def sum_of_ranks(rank: int, world_size: int, *, factor: int) -> tuple[int, int]:
    total = torch.tensor(rank * factor)
    dist.all_reduce(total)
    return total.item(), os.getpid()


def raise_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        raise ValueError("the reason")


def die_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGFPE)
    dist.barrier()


def hang_on_one(rank: int, world_size: int) -> None:
    if rank == 1:
        signal.pause()


def host_module(rank: int, world_size: int) -> str:
    import comfy.ldm.flux.model  # noqa: F401

    import nodes

    return nodes.__file__


def print_process_ids() -> None:
    """Not a case: start two ranks, print their process ids, then wait for the end."""
    from gloo_ranks import GlooRanks

    group = GlooRanks(2)
    group.run("gloo_cases.sum_of_ranks", factor=1)
    sys.stdout.write(" ".join(str(rank.process.pid) for rank in group.ranks) + "\n")
    sys.stdout.flush()
    group.run("gloo_cases.hang_on_one", timeout=600)


if __name__ == "__main__":
    print_process_ids()
