"""The line between the client and rank 0: a Unix-domain socket on which both ends prove that they know the key.

Frames are a length and a JSON object of at most MAX_FRAME bytes, with file descriptors beside it; tensors are never
in a frame. Before the proof each side reads a fixed number of bytes and decodes nothing.
"""

from __future__ import annotations

import array
import contextlib
import hashlib
import hmac
import json
import os
import queue
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .protocol import MAX_SHARED

MAX_FRAME = 1 << 18
GIVE_UP = {"method": "", "give_up": True}  # the frame that asks for new ranks instead of an answer
TAKEN = {"taken": True}  # the frame to a client beside the one that is served
MAX_HANDSHAKES = 32  # at once; the oldest gives way
HANDSHAKE_TIMEOUT = 5.0
POLL = 0.05  # seconds between two looks at whether waiting is still wanted
NONCE = PROOF = 32
LENGTH = struct.Struct("<I")
CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)
ROOM = socket.CMSG_SPACE((MAX_SHARED + 1) * 4) if hasattr(socket, "CMSG_SPACE") else 0


class ConnectionLost(ConnectionError):
    """The peer is gone, or sent what no peer of ours sends."""


class Connection:
    """An authenticated socket. receive() waits as long as it takes; poll(seconds) says whether it would not."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        line.settimeout(None)

    def send(self, frame: dict, descriptors: list[int] | None = None) -> None:
        data = json.dumps(frame).encode()
        if len(data) > MAX_FRAME:
            raise ValueError(f"a frame of {len(data)} bytes; at most {MAX_FRAME} are allowed")
        data = LENGTH.pack(len(data)) + data
        try:
            sent = socket.send_fds(self.line, [data], descriptors) if descriptors else 0
            self.line.sendall(data[sent:])
        except OSError as error:
            raise ConnectionLost(str(error)) from error

    def receive(self) -> tuple[dict, list[int]]:
        """The next frame and the descriptors that came with it, now the caller's."""
        descriptors: list[int] = []
        try:
            (length,) = LENGTH.unpack(self._exactly(LENGTH.size, descriptors))
            if length > MAX_FRAME:
                raise ConnectionLost(f"a frame of {length} bytes")
            frame = json.loads(self._exactly(length, descriptors))
            if not isinstance(frame, dict):
                raise ConnectionLost("a frame that is no object")
            return frame, descriptors
        except (OSError, ValueError, RecursionError) as error:
            for descriptor in descriptors:
                os.close(descriptor)
            raise error if isinstance(error, ConnectionLost) else ConnectionLost(str(error)) from error

    def poll(self, seconds: float) -> bool:
        poller = select.poll()  # select() fails on descriptors above 1023
        try:
            poller.register(self.line, select.POLLIN)
        except ValueError as error:
            raise ConnectionLost("the connection is closed") from error
        return bool(poller.poll(seconds * 1000))

    @property
    def hung_up(self) -> bool:
        """Whether either end has closed it; what the peer sent before may still be there to receive."""
        poller = select.poll()
        try:
            poller.register(self.line, 0)  # of a hang-up poll() tells in any case
        except ValueError:
            return True
        return bool(poller.poll(0))

    def close(self) -> None:
        self.line.close()

    def _exactly(self, size: int, descriptors: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            # Not socket.recv_fds: it drops the flags, and a process that the server starts would inherit (3.11).
            piece, ancillary, _, _ = self.line.recvmsg(size - len(data), ROOM, CLOSE_ON_EXEC)
            for level, kind, received in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    descriptors += array.array("i", received[: len(received) // 4 * 4])
            if not piece:
                raise ConnectionLost("the peer closed the connection")
            data += piece
        return data


class Listener:
    """Rank 0's end: connections that proved to know the key come out of accept().

    With one_at_a_time others get TAKEN while one is there. Garbage, silence and wrong proofs cost a short-lived thread
    each and nothing else.
    """

    def __init__(self, path: Path, key: bytes, *, one_at_a_time: bool = False) -> None:
        self._key = key
        self._one_at_a_time = one_at_a_time
        self._accepted: queue.SimpleQueue[Connection] = queue.SimpleQueue()
        self._handshakes: list[socket.socket] = []
        self._latest: Connection | None = None  # that was handed out or waits for it
        self._lock = threading.Lock()
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # of a rank 0 that was killed
        self._socket = socket.socket(socket.AF_UNIX)
        mask = os.umask(0o177)
        try:
            self._socket.bind(str(path))
        finally:
            os.umask(mask)
        self._socket.listen(64)
        threading.Thread(target=self._listen, name="para-listener", daemon=True).start()

    def accept(self) -> Connection:
        return self._accepted.get()

    def _listen(self) -> None:
        while True:
            try:
                line, _ = self._socket.accept()
            except OSError:
                time.sleep(0.1)  # out of descriptors: others will be closed
                continue
            self._handshakes.append(line)
            if len(self._handshakes) > MAX_HANDSHAKES:
                with contextlib.suppress(OSError):
                    self._handshakes.pop(0).shutdown(socket.SHUT_RDWR)
            threading.Thread(target=self._meet, args=(line,), daemon=True).start()

    def _meet(self, line: socket.socket) -> None:
        try:
            prove_to_client(line, self._key)
        except OSError:
            line.close()
        else:
            self._admit(Connection(line))
        finally:
            with contextlib.suppress(ValueError):
                self._handshakes.remove(line)

    def _admit(self, connection: Connection) -> None:
        with self._lock:
            free = not self._one_at_a_time or self._latest is None or self._latest.hung_up
            if free:
                self._latest = connection
                self._accepted.put(connection)
        if not free:
            with contextlib.suppress(ConnectionLost):
                connection.send(TAKEN)
            connection.close()


def connect(path: Path, key: bytes, look: Callable[[], None] = lambda: None) -> Connection:
    """look: called every 50 ms; what it raises passes through.

    Raises OSError (ConnectionLost) where nobody listens there, or nobody who knows the key.
    """
    line = socket.socket(socket.AF_UNIX)
    try:
        _reach(line, path, look)
        prove_to_server(line, key, look)
        return Connection(line)
    except BaseException:
        line.close()
        raise


def _reach(line: socket.socket, path: Path, look: Callable[[], None]) -> None:
    deadline = time.monotonic() + HANDSHAKE_TIMEOUT
    line.setblocking(False)
    while True:
        try:
            return line.connect(str(path))
        except BlockingIOError:  # many are waiting to be accepted
            look()
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL)


def prove_to_client(line: socket.socket, key: bytes) -> None:
    """Rank 0's side of the handshake. Raises OSError where the peer is none of ours."""
    ours, exactly = secrets.token_bytes(NONCE), Exactly(line, lambda: None)
    line.sendall(ours)
    answer = exactly(NONCE + PROOF)
    theirs, proof = answer[:NONCE], answer[NONCE:]
    if not hmac.compare_digest(proof, _proof(key, b"client", ours, theirs)):
        raise ConnectionLost("the peer does not know the key")
    line.sendall(_proof(key, b"server", ours, theirs))


def prove_to_server(line: socket.socket, key: bytes, look: Callable[[], None]) -> None:
    """The client's side, which proves first. Raises OSError where the peer is no rank 0 of ours."""
    exactly = Exactly(line, look)
    theirs, ours = exactly(NONCE), secrets.token_bytes(NONCE)
    line.sendall(ours + _proof(key, b"client", theirs, ours))
    if not hmac.compare_digest(exactly(PROOF), _proof(key, b"server", theirs, ours)):
        raise ConnectionLost("the peer does not know the key")


def _proof(key: bytes, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.new(key, role + server_nonce + client_nonce, hashlib.sha256).digest()


class Exactly:
    """Reads so many bytes and no more, all reads together within HANDSHAKE_TIMEOUT."""

    def __init__(self, line: socket.socket, look: Callable[[], None]) -> None:
        self._line = line
        self._look = look
        self._deadline = time.monotonic() + HANDSHAKE_TIMEOUT
        line.settimeout(POLL)

    def __call__(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece = self._line.recv(size - len(data))
            except TimeoutError:
                self._look()
                if time.monotonic() > self._deadline:
                    raise
                continue
            if not piece:
                raise ConnectionLost("the peer closed the connection during the handshake")
            data += piece
        return data
