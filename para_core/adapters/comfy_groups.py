"""ComfyUI: the groups of processes that a server has, started when a run first needs them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import folder_paths

from ..parallel_config import ParallelConfig
from ..workers import GroupConfig, WorkerGroup, attach
from .comfy_session import Session, cancelled

SERVICE = "para_core.adapters.comfy_rank:Service"


class Groups:
    """Those that were started here, none of which shares a device with another (two would hold two copies of a model
    there), and those attached to. Ranks on the CPU share it with all others there.

    Lives as long as the server; the groups themselves end with it.
    """

    def __init__(self) -> None:
        self._sessions: dict[tuple, Session] = {}
        self._starting: WorkerGroup | None = None
        self._lock = threading.Lock()  # held while a group starts

    def session(self, config: ParallelConfig) -> Session:
        """What the group for these devices holds; starts or attaches to it where that has not been done, or it is dead.

        Takes seconds then, and ends the groups that share a device with the new one; `Session.replaced` names what they
        ran on, until the next call. Cancel in the interface ends the waiting. Raises WorkerError where a group does not
        start.
        """
        key = config.group
        with self._lock:
            found, replaced = self._sessions.pop(key, None), ()
            if found is None or not found.group.alive:
                if found is not None:
                    found.group.close()
                replaced = self._close(lambda other: not (other[0] or config.attach_to) and set(other[1]) & set(key[1]))
                found = Session(self._start(config))
            found.replaced = replaced
            self._sessions[key] = found  # the latest is the last
        return found

    def running(self) -> ParallelConfig | None:
        """That of the group that was used last and is still there; None where there is none."""
        alive = [key for key, session in list(self._sessions.items()) if session.group.alive]
        return ParallelConfig(alive[-1][1], attach_to=alive[-1][0]) if alive else None

    def state(self) -> list[dict]:
        """What a person is shown of each group; see `WorkerGroup.state`."""
        shown = [(session.group, session.mesh) for session in list(self._sessions.values())]
        if (starting := self._starting) is not None:
            shown.append((starting, ""))
        return [{**group.state(), "mesh": mesh} for group, mesh in shown]

    def close(self) -> None:
        """End all processes that were started here; the next run starts them again. A run that waits for them fails."""
        if (starting := self._starting) is not None:
            starting.close()
        with self._lock:
            self._close(lambda key: True)

    def _close(self, which: Callable[[tuple], bool]) -> tuple[str, ...]:
        """The devices of what ran."""
        devices: list[str] = []
        for key in [key for key in self._sessions if which(key)]:
            session = self._sessions.pop(key)
            devices += key[1] if session.group.alive else ()
            session.group.close()
        return tuple(devices)

    def _start(self, config: ParallelConfig) -> WorkerGroup:
        if config.attach_to:
            return attach(config.attach_to, cancelled=cancelled)
        host = str(Path(folder_paths.__file__).parent)
        settings = GroupConfig(config.devices, SERVICE, backend=config.backend, sys_path=(host,))

        def made(group: WorkerGroup) -> None:
            self._starting = group

        try:
            return WorkerGroup.start(settings, cancelled=cancelled, made=made)
        finally:
            self._starting = None
