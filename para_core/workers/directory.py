"""The private folder (0700) of a group on this machine: its files, and who reads and writes them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
import signal
import stat
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from .config import GroupConfig

PREFIX = "para_workers_"
MAX_BASE = 50  # bytes; Linux allows a socket 107, of which the folder's own name and the socket's take about half
LAST_BYTES = 8192
UNUSED_AFTER = 600.0  # seconds


class GroupDirectory:
    """key, config.json: the client writes them. rank<n>.json (its pid), .beat, .log, .error: rank n. deaths.jsonl,
    agent.log: the agent. rank0.sock: rank 0. rendezvous, root<n>.sock, groups<n>: for the ranks to find each other.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.socket = self.path / "rank0.sock"
        self.agent_log = self.path / "agent.log"
        self.rendezvous = self.path / "rendezvous"
        self._deaths = self.path / "deaths.jsonl"

    @classmethod
    def create(cls, config: GroupConfig) -> GroupDirectory:
        base = _base()
        for old in base.glob(f"{PREFIX}*"):
            _remove_if_orphaned(old)
        directory = cls(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}_", dir=base))
        write_private(directory.path / "key", secrets.token_bytes(32))
        stored = asdict(config) | {"working_directory": os.getcwd()}
        write_private(directory.path / "config.json", json.dumps(stored).encode())
        return directory

    def key(self) -> bytes:
        return (self.path / "key").read_bytes()

    def config(self) -> GroupConfig:
        return GroupConfig(**{key: value for key, value in self._config().items() if key != "working_directory"})

    def working_directory(self) -> str:
        return self._config()["working_directory"]

    def _config(self) -> dict:
        return json.loads((self.path / "config.json").read_text())

    def rank_file(self, rank: int, kind: str) -> Path:
        return self.path / f"rank{rank}.{kind}"

    def pid(self, rank: int) -> int | None:
        """Of the latest process of that rank, which may be dead."""
        try:
            return json.loads(self.rank_file(rank, "json").read_text())["pid"]
        except (FileNotFoundError, ValueError):
            return None

    def beat(self, rank: int) -> int | None:
        """Another one after each sign of life of the rank; see rank_process.beat."""
        try:
            return self.rank_file(rank, "beat").stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def set_ready(self, rank: int) -> None:
        """By the rank itself, when it has started; a new process of that rank has yet to."""
        self.rank_file(rank, "beat").write_text("ready")

    def is_ready(self, rank: int) -> bool:
        with contextlib.suppress(FileNotFoundError):
            return self.rank_file(rank, "beat").stat().st_size > 0
        return False

    def add_death(self, rank: int, pid: int, cause: str) -> None:
        with self._deaths.open("a") as file:
            file.write(json.dumps({"rank": rank, "pid": pid, "cause": cause}) + "\n")

    def deaths(self) -> list[dict]:
        """{"rank", "pid", "cause"} of every process that ended, the earliest first."""
        try:
            return [json.loads(line) for line in self._deaths.read_text().splitlines()]
        except FileNotFoundError:
            return []

    def last_lines(self, rank: int, count: int = 20) -> list[str]:
        return last_lines(self.rank_file(rank, "log"), count)

    def remove(self) -> None:
        """Also while processes that were just killed, or started to replace them, write into it."""
        for _ in range(50):
            shutil.rmtree(self.path, ignore_errors=True)
            if not self.path.exists():
                return
            time.sleep(0.02)


def write_private(path: Path, content: bytes) -> None:
    """0600, and never seen half written. What lies there already, perhaps somebody else's, is not written to."""
    descriptor, part = tempfile.mkstemp(prefix=f"{path.name}.", dir=path.parent)  # 0600, O_EXCL and O_NOFOLLOW
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(part, path)
    except OSError:
        os.unlink(part)
        raise


def read_private(path: Path) -> bytes:
    """Raises FileNotFoundError, and ValueError where others wrote the file or can read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EACCES):  # a link; somebody else's
            raise _not_private(path) from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise _not_private(path)
        return file.read()


def _not_private(path: Path) -> ValueError:
    return ValueError(
        f"{path} is not yours alone: others wrote it or can read it; only you may (chmod 600). Delete it, and start "
        "the group again with an --address in a folder of your own"
    )


def last_lines(path: Path, count: int) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - LAST_BYTES))
            return file.read().decode(errors="replace").splitlines()[-count:]
    except FileNotFoundError:
        return []


def kill_process_group(pid: int | None) -> None:
    """A rank leads a process group of its own: what it started (compilers) goes with it."""
    if pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(pid, signal.SIGKILL)


def _base() -> Path:
    """The temporary folder, or where its name would leave no room for those of sockets, the system's own."""
    bases = [Path(tempfile.gettempdir()), Path("/tmp")]
    for base in bases:
        if len(os.fsencode(base)) <= MAX_BASE and base.is_dir():
            return base
    raise ValueError(
        f"the temporary folder {bases[0]} has a name of {len(os.fsencode(bases[0]))} bytes; sockets in it allow "
        f"{MAX_BASE}. Set TMPDIR to a shorter one."
    )


def _remove_if_orphaned(path: Path) -> None:
    """What a client and an agent that were both killed have left."""
    with contextlib.suppress(OSError, ValueError):
        owner = int(path.name.removeprefix(PREFIX).split("_")[0])
        # The owner may live where its pid is not seen (a container); its ranks then touch files all the time.
        used = max(entry.stat().st_mtime for entry in (path, *path.iterdir()))
        if path.stat().st_uid == os.getuid() and not _exists(owner) and time.time() - used > UNUSED_AFTER:
            shutil.rmtree(path, ignore_errors=True)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
