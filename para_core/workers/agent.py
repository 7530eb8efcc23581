"""The process that starts the ranks and starts them again: torch's elastic agent, under watch.

    python -m para_core.workers.agent DIRECTORY CLIENT_PID

It ends with the client, however that ends, and takes ranks and folder with it. torch.distributed.run counts restarts
over its whole life; here the client counts those in a row, so the agent's own limit is out of reach.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

from torch.distributed.run import main as run

from .directory import GroupDirectory, kill_process_group
from .heartbeat import Silence

RESTARTS = 1_000_000
INTERVAL = 0.1
FAILED = r"failed \(exitcode: (-?\d+)\) local_rank: \d+ \(pid: {pid}\)"  # torch 2.14's words
logger = logging.getLogger(__name__)


class RankWatch:
    """Notes how ranks end, kills those that give no sign of life, and after a death the others of that start.

    The others hang in a collective or wait for a rank that will not come; killed, they are replaced at once.
    While a rank starts it may be silent for start_timeout: Python keeps its other threads waiting while it maps a
    library, which takes long from a disk in the network.
    """

    def __init__(
        self, directory: GroupDirectory, world_size: int, *, heartbeat_timeout: float, start_timeout: float
    ) -> None:
        self._directory = directory
        self._timeouts = {True: heartbeat_timeout, False: start_timeout}  # by whether a rank is ready
        self._silence = Silence()
        self._living: dict[int, int] = {}  # pid: rank
        self._met: set[int] = set()
        self._world_size = world_size
        self._lock = threading.Lock()

    def look(self) -> None:
        pids = {rank: self._directory.pid(rank) for rank in range(self._world_size)}
        silence = self._silence.look({rank: (pid, self._directory.beat(rank)) for rank, pid in pids.items()})
        for rank, pid in pids.items():
            with self._lock:
                known = pid in self._living
                if pid is not None and pid not in self._met and self._is_child(pid):
                    threading.Thread(target=self._await_end, args=(pid, rank), daemon=True).start()
                    self._met.add(pid)  # a killed one is not taken up again while it dies
                    self._living[pid] = rank
                timeout = self._timeouts[self._directory.is_ready(rank)]
                if known and silence[rank] > timeout:
                    kill_process_group(pid)
                    self._note(rank, pid, f"no sign of life for {timeout:g} s")

    def kill_all(self) -> None:
        """In the end: nobody wants to know how they ended."""
        with self._lock:
            for pid in self._living:
                kill_process_group(pid)
            self._living.clear()

    @staticmethod
    def _is_child(pid: int) -> bool:
        try:
            return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
        except ChildProcessError:
            return False

    def _await_end(self, pid: int, rank: int) -> None:
        try:
            # WNOWAIT: only a look; the status is left for the elastic agent.
            ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:  # the elastic agent was first: on a busy machine
            ended = None
        with self._lock:
            if self._living.pop(pid, None) is None:
                return
            for other in self._living:
                kill_process_group(other)
            self._living.clear()
        if ended is None:
            cause = self._logged_cause(pid)
        else:
            cause = _cause(ended.si_status, by_signal=ended.si_code in (os.CLD_KILLED, os.CLD_DUMPED))
        with self._lock:
            self._note(rank, pid, cause)

    def _logged_cause(self, pid: int) -> str:
        """From the line that the elastic agent writes about the first rank whose end it sees."""
        with contextlib.suppress(OSError):
            for _ in range(20):
                if found := re.search(FAILED.format(pid=pid), self._directory.agent_log.read_text(errors="replace")):
                    code = int(found[1])
                    return _cause(abs(code), by_signal=code < 0)
                time.sleep(0.05)
        return "it ended"

    def _note(self, rank: int, pid: int, cause: str) -> None:
        """With the lock, so that causes stand in their order; a full disk costs no more than the note."""
        with contextlib.suppress(OSError):
            self._directory.add_death(rank, pid, cause)


def _cause(status: int, *, by_signal: bool) -> str:
    if not by_signal:
        return f"exit code {status}"
    try:
        return signal.Signals(status).name
    except ValueError:  # one of the real-time ones
        return f"signal {status}"


def watch(directory: GroupDirectory, client: int) -> None:
    config = directory.config()
    # Half: what hangs while it starts is replaced as long as the client still waits.
    heartbeat, start = config.heartbeat_timeout, max(config.start_timeout / 2, config.heartbeat_timeout)
    ranks = RankWatch(directory, len(config.devices), heartbeat_timeout=heartbeat, start_timeout=start)
    met: set[str] = set()
    while os.getppid() == client:
        _look(ranks, met)
        time.sleep(INTERVAL)
    _look(ranks, met)
    ranks.kill_all()
    directory.remove()
    os._exit(1)


def _look(ranks: RankWatch, met: set[str]) -> None:
    """met: the errors that are in the log. None of any kind may keep the client's end from being noticed."""
    try:
        ranks.look()
    except Exception as error:
        if repr(error) not in met:
            met.add(repr(error))
            logger.exception("the ranks could not be looked at")


def main(path: str, client: str) -> None:
    directory = GroupDirectory(path)
    threading.Thread(target=watch, args=(directory, int(client)), daemon=True).start()
    arguments = {
        "nnodes": 1,
        "nproc-per-node": len(directory.config().devices),
        # A file in the private folder instead of --standalone's store, which listens on every interface.
        "rdzv-backend": "c10d",
        "rdzv-conf": "store_type=file",
        "rdzv-endpoint": directory.rendezvous,
        "rdzv-id": directory.path.name,
        "local-addr": "127.0.0.1",
        "max-restarts": RESTARTS,
        "monitor-interval": INTERVAL,
        "log-dir": directory.path / "elastic",
    }
    command = [f"--{name}={value}" for name, value in arguments.items()]
    script = Path(__file__).with_name("rank_process.py")
    run([*command, str(script), str(os.getpid()), str(directory.path)])


if __name__ == "__main__":
    main(*sys.argv[1:])
