"""How ranks of several machines find each other: a TCPStore that rank 0 holds, announced by the agents' own store.

It binds one address and, like the agents' store, trusts its network. Ranks of one machine: see private_store.py.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from datetime import timedelta
from typing import Protocol

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

ATTEMPT = timedelta(seconds=5)
PATIENCE = timedelta(days=1)  # of one wait, begun again then; each that ends leaves warnings in the log


class ControlStore(Protocol):
    """What the rounds need. get() waits as long as the ranks live; set_first() leaves a value that is there."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> str: ...

    def set_first(self, key: str, value: str) -> None: ...


class LeadersStore(ControlStore, Protocol):
    """What rank 0 needs besides."""

    def check(self, key: str) -> bool: ...

    def delete(self, key: str) -> None: ...


class Root(Protocol):
    """groups(): for torch's process groups. control(): for our own rounds, on rank 0 a LeadersStore."""

    def groups(self) -> Store: ...

    def control(self) -> LeadersStore: ...


class RootStore:
    """open() gives a connection of one's own: a store's wait() keeps its connection from every other thread."""

    BOARD = "para_workers/root"  # on the agents' store; announcements of earlier starts may still hang there

    def __init__(self, address: tuple[str, int], token: str, server: Store | None, timeout: timedelta) -> None:
        self._address = address
        self._token = token
        self._server = server  # held: it listens as long as it lives
        self._timeout = timeout

    @classmethod
    def meet(cls, rank: int, host: str, board: Store, timeout: timedelta) -> RootStore:
        """host: the address that rank 0 binds."""
        return cls.find(board, timeout) if rank else cls.hold(host, board, timeout)

    @classmethod
    def hold(cls, host: str, board: Store, timeout: timedelta) -> RootStore:
        """On rank 0. host: the address to bind, and no other."""
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.bind(address)
        listening.listen(128)
        port, token = listening.getsockname()[1], secrets.token_hex(16)
        server = TCPStore(
            host,
            port,
            is_master=True,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=listening.detach(),
        )
        server.set("token", token)
        board.set(cls.BOARD, json.dumps([host, port, token]))
        return cls((host, port), token, server, timeout)

    @classmethod
    def find(cls, board: Store, timeout: timedelta) -> RootStore:
        """On every other rank. Raises TimeoutError."""
        deadline = time.monotonic() + timeout.total_seconds()
        while time.monotonic() < deadline:
            if board.check([cls.BOARD]):
                host, port, token = json.loads(board.get(cls.BOARD))
                found = cls((host, port), token, None, timeout)
                if found._answers():
                    return found
            time.sleep(0.02)
        raise TimeoutError(f"rank 0 has announced no store within {timeout}")

    def open(self) -> Store:
        store = TCPStore(*self._address, is_master=False, timeout=ATTEMPT, wait_for_workers=False)
        store.set_timeout(self._timeout)
        return store

    def groups(self) -> Store:
        return PrefixStore("groups", self.open())

    def control(self) -> PatientStore:
        return PatientStore(self.open())

    def _answers(self) -> bool:
        """Not the announcement of a rank 0 that is dead, at whose port somebody else may listen now."""
        try:
            store = self.open()
            return store.check(["token"]) and store.get("token").decode() == self._token
        except RuntimeError:
            return False


class PatientStore:
    """A LeadersStore. Raises DistNetworkError once rank 0 is gone."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def set(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> str:
        while True:
            try:
                self._store.wait([key], PATIENCE)
                return self._store.get(key).decode()
            except DistNetworkError:
                raise
            except DistStoreError:
                continue  # nothing yet

    def check(self, key: str) -> bool:
        return self._store.check([key])

    def set_first(self, key: str, value: str) -> None:
        self._store.compare_set(key, "", value)

    def delete(self, key: str) -> None:
        self._store.delete_key(key)
