"""Starts the agent of a group on this machine, and ends it with everything it has started."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from .config import GroupConfig
from .directory import GroupDirectory, kill_process_group, last_lines

PACK_ROOT = Path(__file__).absolute().parents[2]
# What a torchrun around this process has set is not for the ranks.
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class LocalGroup:
    """The agent's process and the group's folder."""

    def __init__(self, config: GroupConfig) -> None:
        require_linux()
        cuda = [device for device in config.devices if device.startswith("cuda")]
        if len(set(cuda)) < len(cuda):
            raise ValueError(f"devices={config.devices} names a device twice; NCCL needs one device a rank")
        self.config = config
        self.directory = GroupDirectory.create(config)
        command = [sys.executable, "-m", f"para_core.{__package__.rpartition('.')[2]}.agent"]
        try:
            with self.directory.agent_log.open("wb") as log:
                self.process = subprocess.Popen(
                    [*command, str(self.directory.path), str(os.getpid())],
                    cwd=self.directory.path,
                    env=environment(config),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError:
            self.directory.remove()
            raise

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def pids(self) -> dict[int, int]:
        """By rank, of processes that live and are this group's."""
        found = {rank: self.directory.pid(rank) for rank in range(len(self.config.devices))}
        return {rank: pid for rank, pid in found.items() if pid is not None and _is_ours(pid, str(self.directory.path))}

    def kill_ranks(self) -> None:
        """The agent starts new ones."""
        for pid in self.pids().values():
            kill_process_group(pid)

    def failure_to_start(self) -> tuple[int | None, str] | None:
        """Rank and text, once something failed that a restart does not mend."""
        files = [self.directory.rank_file(rank, "error") for rank in range(len(self.config.devices))]
        found = sorted((file.stat().st_mtime, rank) for rank, file in enumerate(files) if file.exists())
        if found:
            return found[0][1], files[found[0][1]].read_text()
        if not self.alive:
            lines = last_lines(self.directory.agent_log, 30)
            return None, "\n".join([f"its agent ended with exit code {self.process.returncode}", *lines])
        return None

    def close(self) -> None:
        """Returns when no process and no file is left, after 5 seconds at the latest."""
        deadline = time.monotonic() + 5.0
        self.process.kill()
        self.process.wait()
        while (pids := self.pids()) and time.monotonic() < deadline:
            for pid in pids.values():
                kill_process_group(pid)
            time.sleep(0.02)
        self.directory.remove()


def require_linux() -> None:
    """Raises ValueError elsewhere: memory without a name, and processes that end with their parent, are Linux's."""
    if sys.platform != "linux":
        raise ValueError(
            f"a group of ranks cannot run on {sys.platform}; use Linux (on Windows: WSL), or one device without a group"
        )


def environment(config: GroupConfig) -> dict[str, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in TORCHRUN and not name.startswith("TORCHELASTIC_")
    }
    inherited = [env["PYTHONPATH"]] if env.get("PYTHONPATH") else []
    env |= {
        "PYTHONPATH": os.pathsep.join([*config.sys_path, str(PACK_ROOT), *inherited]),
        "OMP_NUM_THREADS": str(config.num_threads),
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        # The agent would hold a store for the ranks, on every interface; they have one of their own.
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }
    return env | config.environment


def _is_ours(pid: int, path: str) -> bool:
    """Whether that process was started with the folder as an argument: pids are used again."""
    try:
        return path.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
