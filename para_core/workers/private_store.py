"""How the ranks of one machine find each other: by files and a socket in the group's private folder.

A TCPStore would serve anyone on the machine who finds its port.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from torch.distributed import FileStore, Store

from .channel import Connection, ConnectionLost, Listener, connect

RETRY = 0.02  # seconds


class PrivateRoot:
    """groups(): for torch's process groups. control(): for our own rounds; see ControlStore."""

    def __init__(self, folder: Path, start: str, rank: int, world_size: int, key: bytes, timeout: timedelta) -> None:
        """start: tells this start of the ranks from earlier ones in the same folder."""
        self._groups = folder / f"groups{start}"
        self._socket = folder / f"root{start}.sock"
        self._world_size, self._key, self._timeout = world_size, key, timeout
        self._held = HeldStore(Listener(self._socket, key)) if rank == 0 else None

    def groups(self) -> Store:
        store = FileStore(str(self._groups), self._world_size)
        store.set_timeout(self._timeout)
        return store

    def control(self) -> HeldStore | LineStore:
        """Raises TimeoutError where rank 0 does not answer."""
        if self._held is not None:
            return self._held
        deadline = time.monotonic() + self._timeout.total_seconds()
        while True:
            try:
                return LineStore(connect(self._socket, self._key))
            except OSError as error:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"rank 0 holds no store within {self._timeout}") from error
                time.sleep(RETRY)


class HeldStore:
    """Rank 0's own end, from any thread; the others' come in by the listener."""

    def __init__(self, listener: Listener) -> None:
        self._values: dict[str, str] = {}
        self._waiting: dict[str, list[Connection]] = {}
        self._changed = threading.Condition()
        threading.Thread(target=self._accept, args=(listener,), name="para-store", daemon=True).start()

    def set(self, key: str, value: str) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()
            # From this thread: another one would get its turn only when this one waits.
            for connection in self._waiting.pop(key, ()):
                with suppress(ConnectionLost):
                    connection.send({"value": value})

    def get(self, key: str) -> str:
        with self._changed:
            self._changed.wait_for(lambda: key in self._values)
            return self._values[key]

    def check(self, key: str) -> bool:
        with self._changed:
            return key in self._values

    def set_first(self, key: str, value: str) -> None:
        with self._changed:
            if key not in self._values:
                self.set(key, value)

    def delete(self, key: str) -> None:
        with self._changed:
            self._values.pop(key, None)

    def _accept(self, listener: Listener) -> None:
        while True:
            threading.Thread(target=self._serve, args=(listener.accept(),), daemon=True).start()

    def _serve(self, connection: Connection) -> None:
        """Until that rank is gone, and with it, before long, this one."""
        methods = {"set": self.set, "set_first": self.set_first}
        try:
            while True:
                frame, _ = connection.receive()
                if frame["method"] == "get":
                    self._answer(connection, *frame["values"])
                else:
                    connection.send({"value": methods[frame["method"]](*frame["values"])})
        except ConnectionLost:
            connection.close()

    def _answer(self, connection: Connection, key: str) -> None:
        with self._changed:
            if key in self._values:
                connection.send({"value": self._values[key]})
            else:
                self._waiting.setdefault(key, []).append(connection)


class LineStore:
    """Another rank's end, for one thread. Raises ConnectionLost once rank 0 is gone."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def set(self, key: str, value: str) -> None:
        self._ask("set", key, value)

    def get(self, key: str) -> str:
        return self._ask("get", key)

    def set_first(self, key: str, value: str) -> None:
        self._ask("set_first", key, value)

    def _ask(self, method: str, *values: str) -> str | None:
        self._connection.send({"method": method, "values": values})
        frame, _ = self._connection.receive()
        return frame["value"]
