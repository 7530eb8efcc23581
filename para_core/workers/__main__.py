"""A rank of a group that the user starts, on one machine or several; `attach(PATH)` is its client.

    torchrun --nnodes 2 --nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --max-restarts 100 \\
        -m para_core.workers --service package.module:Factory --address PATH

The same on each machine; --address names the socket that the client opens, and the rank that makes it is rank 0: the
first one to which it was given. Given on one machine only, that is the client's machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import socket
import sys
from datetime import timedelta
from pathlib import Path

import torch
from torch.distributed import Store, TCPStore

from .config import GroupConfig
from .directory import read_private, write_private
from .heartbeat import StoreBeats
from .launch import require_linux
from .process import settle
from .rank import Place, join
from .root_store import RootStore


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="torchrun ... -m para_core.workers", description=__doc__.splitlines()[0])
    parser.add_argument("--service", required=True, help="package.module:Factory")
    parser.add_argument("--address", type=Path, help="socket for the client; its key is written beside it")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument("--backend", choices=("auto", "gloo", "nccl"), default="auto")
    parser.add_argument(
        "--host", help="this machine's address for the other ranks; default: the one that leads to them"
    )
    parser.add_argument(
        "--sys-path", action="append", default=[], help="folder to import from; may be given repeatedly"
    )
    parser.add_argument("--num-threads", type=int, default=1, help="of a rank on the CPU")
    parser.add_argument("--start-timeout", type=float, default=120.0, help="seconds until all ranks are ready")
    parser.add_argument(
        "--collective-timeout", type=float, default=600.0, help="seconds; also for the other ranks once one is done"
    )
    parser.add_argument(
        "--call-timeout", type=float, default=3600.0, help="seconds of a call in which no rank gets anywhere"
    )
    parser.add_argument(
        "--heartbeat-timeout", type=float, default=20.0, help="seconds until a silent rank counts as dead"
    )
    parser.add_argument(
        "--failure-grace", type=float, default=5.0, help="seconds for the others once a rank has raised"
    )
    return parser.parse_args()


def group_config(given: argparse.Namespace) -> GroupConfig:
    cuda = given.device == "cuda" or (given.device == "auto" and torch.cuda.is_available())
    passed = ("service", "backend", "num_threads", "start_timeout", "collective_timeout", "call_timeout")
    passed += ("heartbeat_timeout", "failure_grace")
    return GroupConfig(
        devices=(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else "cpu",),
        **{name: getattr(given, name) for name in passed},
    )


def agents_store() -> Store:
    """The store by which the agents met; it outlives the ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        raise ValueError(
            "torchrun shares no store with its ranks; unset TORCH_DISABLE_SHARE_RDZV_TCP_STORE and use "
            "--rdzv-backend c10d or static"
        )
    return TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, wait_for_workers=False)


def own_address() -> str:
    """Of the interface that leads to the agents' store; connecting a datagram socket sends nothing."""
    family, kind, _, _, address = socket.getaddrinfo(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), type=socket.SOCK_DGRAM
    )[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def key_beside(address: Path) -> bytes:
    """Kept over restarts of the ranks, so that the client finds its way back."""
    path = address.with_name(f"{address.name}.key")
    with contextlib.suppress(FileNotFoundError):
        return read_private(path)
    key = secrets.token_bytes(32)
    write_private(path, key)
    return key


def main() -> None:
    require_linux()
    settle()
    given = arguments()
    sys.path[:0] = given.sys_path
    config = group_config(given)
    elastic_rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    patience = timedelta(seconds=config.start_timeout)
    root = RootStore.meet(elastic_rank, given.host or own_address(), agents_store(), patience)
    store = root.open()
    store.set(f"address/{elastic_rank}", "1" if given.address else "0")
    offered = [rank for rank in range(world_size) if store.get(f"address/{rank}") == b"1"]
    if not offered:
        raise ValueError("no rank has an --address, so that no client could reach the group; give it on its machine")
    rank = (elastic_rank - offered[0]) % world_size
    StoreBeats(root.open(), rank, world_size, config.heartbeat_timeout).start()
    address = given.address if rank == 0 else None
    place = Place(rank, world_size, config.devices[0], root, address, key_beside(address) if address else b"")
    join(place, config)()


if __name__ == "__main__":
    main()
