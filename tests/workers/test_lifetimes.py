"""What is left of a group, and what its ranks open, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from para_core.workers import Cancelled, Shared, WorkerError, WorkerGroup

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

CLIENT = """
import sys, time
from para_core.workers import GroupConfig, WorkerGroup
service = "workers.services:Session"
group = WorkerGroup.start(GroupConfig(devices=("cpu", "cpu"), service=service, sys_path=(sys.argv[1],)))
print(group.address, flush=True)
group.call("sleep", 60.0)
"""


def processes_of(directory: Path) -> list[int]:
    """Agent and ranks: the folder is one of their arguments."""
    found = []
    for process in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if str(directory).encode() in (process / "cmdline").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def listening(pid: int) -> set[str]:
    """Hex addresses of the TCP sockets on which a process listens."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(descriptor))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].split(":")[0])
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@linux
def test_only_loopback_is_bound_and_two_groups_live_side_by_side(group, start):
    other = start(devices=("cpu",) * 3, service="workers.services:FarSession")
    assert other.call("info")[:2] == [0, 3] and group.call("info")[:2] == [0, 2]
    assert other.address != group.address
    for directory, count in ((group.address.parent, 2), (other.address.parent, 3)):
        pids = processes_of(directory)
        assert len(pids) == count + 1
        bound = set().union(*map(listening, pids))
        assert bound and bound <= LOOPBACK
    payload = [torch.arange(1000.0), torch.ones(5, dtype=torch.int8)]
    expected = torch.tensor([[499500.0, 5.0]] * 3, dtype=torch.float64)
    assert torch.equal(other.call("sums", payload), expected), "the third rank receives by broadcast"
    assert torch.equal(other.call("sums", Shared(payload)), expected)


@linux
def test_killed_client_leaves_no_process_and_no_file():
    folders = [str(Path(__file__).absolute().parents[2]), str(Path(__file__).absolute().parents[1])]
    env = os.environ | {"PYTHONPATH": folders[0]}
    client = subprocess.Popen([sys.executable, "-c", CLIENT, folders[1]], env=env, stdout=subprocess.PIPE, text=True)
    directory = Path(client.stdout.readline().strip()).parent
    assert len(processes_of(directory)) == 3
    os.kill(processes_of(directory)[-1], signal.SIGSTOP)  # a rank that cannot notice
    client.kill()
    client.wait()
    client.stdout.close()
    deadline = time.monotonic() + 10
    while (processes_of(directory) or directory.exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not processes_of(directory) and not directory.exists()


@linux
def test_killed_agent_takes_the_ranks_along_and_the_client_says_so(start):
    group = start()
    directory = group.address.parent
    (agent,) = [pid for pid in processes_of(directory) if b"para_core.workers.agent" in _cmdline(pid)]
    os.kill(agent, signal.SIGKILL)
    with pytest.raises(WorkerError, match="agent ended with exit code -9"):
        group.call("sleep", 60.0)
    assert not processes_of(directory) and not directory.exists() and not group.alive


def _cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@linux
def test_cancelled_start_leaves_nothing(group_config):
    before = set(Path(os.environ.get("TMPDIR", "/tmp")).glob("para_workers_*"))
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        WorkerGroup.start(group_config(), cancelled=lambda: time.monotonic() - begun > 0.5)
    assert time.monotonic() - begun < 4
    assert set(Path(os.environ.get("TMPDIR", "/tmp")).glob("para_workers_*")) <= before


def test_close_during_a_call_of_another_thread_ends_it(start):
    group, errors = start(), []

    def sleep():
        try:
            group.call("sleep", 60.0)
        except WorkerError as error:
            errors.append(str(error))

    thread = threading.Thread(target=sleep)
    thread.start()
    time.sleep(0.5)
    group.close()
    thread.join(5)
    assert not thread.is_alive() and "the group is closed" in errors[0]
