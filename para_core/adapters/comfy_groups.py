"""ComfyUI: the groups of processes that a server has, started when a run first needs them."""

from __future__ import annotations

import threading
from pathlib import Path

import folder_paths

from ..parallel_config import ParallelConfig
from ..workers import GroupConfig, WorkerGroup, attach
from .comfy_session import Session, cancelled

SERVICE = "para_core.adapters.comfy_rank:Service"


class Groups:
    """At most one group that was started here (two would hold two copies of a model), and those attached to.

    Lives as long as the server; the groups themselves end with it.
    """

    def __init__(self) -> None:
        self._sessions: dict[tuple, Session] = {}
        self._starting: WorkerGroup | None = None
        self._lock = threading.Lock()  # held while a group starts

    def session(self, config: ParallelConfig) -> Session:
        """What the group for these devices holds; starts or attaches to it where that has not been done, or it is dead.

        Takes seconds then; cancel in the interface ends the waiting. Raises WorkerError where a group does not start.
        """
        key = config.group
        with self._lock:
            found = self._sessions.get(key)
            if found is None or not found.group.alive:
                self._close(lambda other: other == key or not (other[0] or config.attach_to))
                found = self._sessions[key] = Session(self._start(config))
        return found

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

    def _close(self, which) -> None:
        for key in [key for key in self._sessions if which(key)]:
            self._sessions.pop(key).group.close()

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
