"""What a group has on this machine while it lives, and what is left of that when it should be gone."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

SEGMENTS = "/dev/shm/"


def processes_of(directory: Path) -> list[int]:
    """Agent and ranks: the folder is one of their arguments."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if str(directory).encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


class Traces:
    """Of the group in this folder and of its client, now: processes, folder and sockets, named shared memory."""

    def __init__(self, directory: Path, client: int) -> None:
        self.directory = directory
        self.processes = [client, *processes_of(directory)]
        self.segments = {segment for pid in self.processes for segment in _segments(pid)}

    def left(self, seconds: float) -> list[object]:
        """What is there still after at most that many seconds."""
        deadline = time.monotonic() + seconds
        while (found := list(self._left())) and time.monotonic() < deadline:
            time.sleep(0.05)
        return found

    def _left(self) -> Iterator[object]:
        yield from {pid for pid in self.processes if _runs(pid)} | set(processes_of(self.directory))
        yield from (path for path in (self.directory, *sorted(self.segments)) if os.path.exists(path))


def _segments(pid: int) -> Iterable[str]:
    """Open or mapped there."""
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if (target := os.readlink(descriptor)).startswith(SEGMENTS):
                yield target
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        if SEGMENTS in line and not line.endswith("(deleted)"):
            yield line[line.index(SEGMENTS) :]


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
