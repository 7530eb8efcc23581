"""What people are shown of a group and of each of its ranks."""

from __future__ import annotations

from .launch import LocalGroup
from .line import Line
from .losses import Losses


def describe(line: Line, losses: Losses, local: LocalGroup | None, *, alive: bool) -> dict:
    """See WorkerGroup.state: a rank has rank, device, pid, state, memory_bytes, error and log (its last lines)."""
    peers = line.hello.get("ranks", [])
    if local is not None and not peers:
        peers = [{"device": device} for device in local.config.devices]
    pids = local.pids() if local is not None else {rank: peer.get("pid") for rank, peer in enumerate(peers)}
    state = line.state() if alive else "lost"
    error = losses.latest
    ranks = [
        {
            "rank": rank,
            "device": peer["device"],
            "pid": pids.get(rank),
            "state": state if pids.get(rank) else "starting" if alive else "lost",
            "memory_bytes": line.memory[rank] if rank < len(line.memory) else 0,
            "error": str(error) if error is not None and error.rank == rank else "",
            "log": local.directory.last_lines(rank) if local is not None else [],
        }
        for rank, peer in enumerate(peers)
    ]
    return {"address": str(line.address), "restarts": line.hello.get("restarts", 0), "ranks": ranks}
