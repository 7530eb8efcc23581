"""How ranks find each other: a TCPStore that rank 0 holds, bound to one address and announced on a board."""

from __future__ import annotations

import json
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from torch.distributed import Store, TCPStore

from .directory import write_private

ATTEMPT = timedelta(seconds=5)


class Board(Protocol):
    """Where rank 0 announces its store to the others; announcements of earlier starts may still hang there."""

    def announce(self, text: str) -> None: ...

    def read(self) -> str | None: ...


class FileBoard:
    def __init__(self, path: Path) -> None:
        self._path = path

    def announce(self, text: str) -> None:
        write_private(self._path, text.encode())

    def read(self) -> str | None:
        return self._path.read_text() if self._path.exists() else None


class StoreBoard:
    """The elastic agents' own store, for ranks on several machines."""

    KEY = "para_workers/root"

    def __init__(self, store: Store) -> None:
        self._store = store

    def announce(self, text: str) -> None:
        self._store.set(self.KEY, text)

    def read(self) -> str | None:
        return self._store.get(self.KEY).decode() if self._store.check([self.KEY]) else None


class RootStore:
    """open() gives a connection of one's own: a store's wait() keeps its connection from every other thread."""

    def __init__(self, address: tuple[str, int], token: str, server: Store | None, timeout: timedelta) -> None:
        self._address = address
        self._token = token
        self._server = server  # held: it listens as long as it lives
        self._timeout = timeout

    @classmethod
    def meet(cls, rank: int, host: str, board: Board, timeout: timedelta) -> RootStore:
        """host: the address that rank 0 binds."""
        return cls.find(board, timeout) if rank else cls.hold(host, board, timeout)

    @classmethod
    def hold(cls, host: str, board: Board, timeout: timedelta) -> RootStore:
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
        board.announce(json.dumps([host, port, token]))
        return cls((host, port), token, server, timeout)

    @classmethod
    def find(cls, board: Board, timeout: timedelta) -> RootStore:
        """On every other rank. Raises TimeoutError."""
        deadline = time.monotonic() + timeout.total_seconds()
        while time.monotonic() < deadline:
            if text := board.read():
                host, port, token = json.loads(text)
                found = cls((host, port), token, None, timeout)
                if found._answers():
                    return found
            time.sleep(0.02)
        raise TimeoutError(f"rank 0 has announced no store within {timeout}")

    def open(self) -> Store:
        store = TCPStore(*self._address, is_master=False, timeout=ATTEMPT, wait_for_workers=False)
        store.set_timeout(self._timeout)
        return store

    def _answers(self) -> bool:
        """Not the announcement of a rank 0 that is dead, at whose port somebody else may listen now."""
        try:
            store = self.open()
            return store.check(["token"]) and store.get("token").decode() == self._token
        except RuntimeError:
            return False
