"""One rank: makes the service, then runs its methods as the client calls them.

rank_process.py runs it for a group of this machine, __main__.py for one that the user starts.
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
from .ports import deaf_afterwards
from .private_store import PrivateRoot
from .process import settle
from .root_store import Root
from .server import Follower, Leader
from .status import formatted

FAILED_TO_START = 71  # exit code


@dataclass(frozen=True)
class Place:
    """Where a rank stands, and for rank 0 where it listens to the client."""

    rank: int
    world_size: int
    device: str
    root: Root
    socket: Path | None
    key: bytes


class FailedToStart(Exception):
    """The service could not be made: starting again would not help."""


def join(place: Place, config: GroupConfig) -> Callable[[], None]:
    """Makes the service and joins the other ranks. What it returns serves calls and does not end."""
    device = torch.device(place.device)
    torch.set_num_threads(config.num_threads)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with deaf_afterwards():
        dist.init_process_group(
            config.process_group_backend,
            store=place.root.groups(),
            rank=place.rank,
            world_size=place.world_size,
            timeout=config.process_group_timeout,
        )
    context = WorkerContext(place.rank, place.world_size, device)
    service = made(config.service, context)
    if place.rank:
        return Follower(context, service, place.root, config).run
    leader = Leader(context, service, place.root, config)
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
    settle()
    os.chdir(directory.working_directory())
    config = directory.config()
    patience, start = timedelta(seconds=config.start_timeout), os.environ["TORCHELASTIC_RESTART_COUNT"]
    root = PrivateRoot(directory.path, start, rank, len(config.devices), directory.key(), patience)
    place = Place(rank, len(config.devices), config.devices[rank], root, directory.socket, directory.key())
    try:
        serve = join(place, config)
        directory.set_ready(rank)
        serve()
    except FailedToStart as error:
        write_private(directory.rank_file(rank, "error"), formatted(error.__cause__).encode())
        sys.exit(FAILED_TO_START)


if __name__ == "__main__":
    main(*sys.argv[1:])
