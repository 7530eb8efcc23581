"""One rank: makes the service, then runs its methods as the client calls them.

python -m para_core.workers.rank DIRECTORY          (started by agent.py)
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .config import GroupConfig, WorkerContext
from .directory import GroupDirectory, write_private
from .heartbeat import beat
from .process import settle

FAILED_TO_START = 71  # exit code


@dataclass(frozen=True)
class Place:
    """Where a rank finds what it needs: socket and key of rank 0's channel, the host to bind, the board."""

    rank: int
    world_size: int
    device: str
    socket: Path
    key: bytes
    host: str
    board: object


class FailedToStart(Exception):
    """The service could not be made: starting again would not help."""


def join(place: Place, config: GroupConfig) -> Callable[[], None]:
    """Makes the service and joins the other ranks. What it returns serves calls and does not end."""
    from .root_store import RootStore
    from .server import Follower, Leader

    device = torch.device(place.device)
    torch.set_num_threads(config.num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    patience = timedelta(seconds=config.start_timeout)
    root = RootStore.find(place.board, patience) if place.rank else RootStore.hold(place.host, place.board, patience)
    dist.init_process_group(
        config.process_group_backend,
        store=dist.PrefixStore("groups", root.open()),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=config.collective_timeout),
    )
    context = WorkerContext(place.rank, place.world_size, device)
    service = made(config.service, context)
    if place.rank:
        return Follower(context, service, root).run
    leader = Leader(context, service, root, config.failure_grace)
    return lambda: leader.run(place.socket, place.key)


def made(service: str, context: WorkerContext) -> object:
    module, _, name = service.partition(":")
    try:
        with torch.inference_mode():
            return getattr(importlib.import_module(module), name)(context)
    except Exception as error:
        raise FailedToStart from error


def main(path: str) -> None:
    directory, rank = GroupDirectory(path), int(os.environ["RANK"])
    directory.write_pid(rank)
    settle(directory.rank_file(rank, "log"))
    beat(directory.rank_file(rank, "beat"))
    os.chdir(directory.working_directory())
    from .root_store import FileBoard

    config = directory.config()
    board = FileBoard(directory.path / f"root{os.environ['TORCHELASTIC_RESTART_COUNT']}.json")
    device = config.devices[rank]
    place = Place(rank, len(config.devices), device, directory.socket, directory.key(), "127.0.0.1", board)
    try:
        join(place, config)()
    except FailedToStart as error:
        from .status import formatted

        write_private(directory.rank_file(rank, "error"), formatted(error.__cause__).encode())
        sys.exit(FAILED_TO_START)


if __name__ == "__main__":
    main(*sys.argv[1:])
