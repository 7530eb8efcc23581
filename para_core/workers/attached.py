"""The client of a group that the user started with torchrun; see __main__.py."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from .config import GroupConfig
from .directory import read_private
from .group import WorkerGroup
from .launch import require_linux
from .line import Line
from .losses import Losses


def attach(
    address: str | os.PathLike,
    *,
    cancelled: Callable[[], bool] | None = None,
    start_timeout: float = 60.0,
    max_restarts: int = 2,
) -> WorkerGroup:
    """A client of the group that the user started with torchrun; see __main__.py.

    address: the socket of its rank 0, on this machine; the key lies beside it. Raises ValueError where there is none
    or it is not this user's alone, and WorkerError where the group has another client.
    """
    require_linux()
    path = Path(address)
    config = GroupConfig(("cpu",), "attached:group", start_timeout=start_timeout, max_restarts=max_restarts)
    line = Line(path, _key_beside(path))
    group = WorkerGroup(line, Losses(None, max_restarts), config)
    group.join(cancelled)
    hello = line.hello
    devices = tuple(peer["device"] for peer in hello["ranks"])
    group.config = replace(config, devices=devices, collective_timeout=hello["collective_timeout"])
    return group


def _key_beside(address: Path) -> bytes:
    key = address.with_name(f"{address.name}.key")
    try:
        return read_private(key)
    except FileNotFoundError:
        raise ValueError(
            f"no group at {address}: {key.name} is not beside it; start one with torchrun ... --address {address}"
        ) from None
