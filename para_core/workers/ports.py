"""The ports on which a rank waits for the others while they connect, deaf from then on.

Every process group of gloo listens on one of its own, and its ranks are all connected once it is made. Left as it is,
the port takes connections from anyone and keeps them, until the process is out of descriptors and gloo ends it.
Source: pytorch/gloo@70dc360 transport/tcp/listener.cc, which cannot be told to stop.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import stat
import struct
from collections.abc import Iterator

SO_ATTACH_FILTER = 26  # of Linux, Documentation/networking/filter.rst
RETURN_NOTHING = struct.pack("HBBI", 0x06, 0, 0, 0)  # BPF_RET | BPF_K: no byte of any packet is let through
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def deaf_afterwards() -> Iterator[None]:
    """Around what makes process groups, on every rank: ports that are opened in it take no connection after it.

    What is connected stays so. NCCL opens its ports at its first collective, and needs them later: not in here.
    """
    before = set(_listening())
    yield
    for inode, descriptor in _listening().items():
        if inode not in before:
            _deafen(descriptor)


def _listening() -> dict[int, int]:
    """The sockets that wait for TCP connections, inode: descriptor."""
    found = {}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # the folder's own, closed by now
            status = os.fstat(descriptor)
            if stat.S_ISSOCK(status.st_mode) and _waits(descriptor):
                found[status.st_ino] = descriptor
    return found


def _waits(descriptor: int) -> bool:
    with socket.socket(fileno=os.dup(descriptor)) as line:
        tcp = line.family in (socket.AF_INET, socket.AF_INET6) and line.type == socket.SOCK_STREAM
        return tcp and bool(line.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _deafen(descriptor: int) -> None:
    """By a filter in the kernel, which drops what asks for a connection; the socket itself is gloo's."""
    program = ctypes.create_string_buffer(RETURN_NOTHING)
    with socket.socket(fileno=os.dup(descriptor)) as line:
        try:
            line.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", 1, ctypes.addressof(program)))
        except OSError as error:
            logger.warning("port %d goes on taking connections from anyone here: %s", line.getsockname()[1], error)
