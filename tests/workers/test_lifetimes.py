"""What is left of a group, and what its ranks open, whatever ends it."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from traces import Traces, processes_of

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


def listening(pid: int) -> set[tuple[str, int]]:
    """Hex address and port of the TCP sockets on which a process listens."""
    inodes = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(descriptor))
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@linux
def test_only_loopback_is_bound_and_two_groups_live_side_by_side(group, start):
    other = start(devices=("cpu",) * 3, service="workers.services:FarSession", collective_timeout=300.0)
    assert other.call("info")[:2] == [0, 3] and group.call("info")[:2] == [0, 2]
    assert other.address != group.address
    for directory, count in ((group.address.parent, 2), (other.address.parent, 3)):
        pids = processes_of(directory)
        assert len(pids) == count + 1
        bound = {address for pid in pids for address, _ in listening(pid)}
        assert bound and bound <= LOOPBACK
    payload = [torch.arange(1000.0), torch.ones(5, dtype=torch.int8)]
    expected = torch.tensor([[499500.0, 5.0]] * 3, dtype=torch.float64)
    assert torch.equal(other.call("sums", payload), expected), "the third rank receives by broadcast"
    assert torch.equal(other.call("sums", Shared(payload)), expected)
    assert other.call("timeouts") == [300.0, 300.0], "of all ranks, and of the broadcast to the third"


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    """What a shell gives by itself on most systems."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@linux
def test_strangers_on_the_ranks_ports_get_nothing_and_crash_nothing(few_descriptors, start):
    """What listens there is torch's transport of tensors; the group's orders go by a socket in its private folder."""
    group, source = start(), random.Random(3)
    ranks = [rank["pid"] for rank in group.state()["ranks"]]
    ports = [port for pid in ranks for _, port in listening(pid)]
    assert len(ports) == len(ranks)
    kept, reached = [], 0
    for round_ in range(10_000):
        line = socket.socket()
        line.setblocking(False)
        with contextlib.suppress(OSError):
            line.connect(("127.0.0.1", ports[round_ % 50 == 0]))
        with contextlib.suppress(OSError):
            reached += line.send(source.randbytes(source.randrange(200)))
        kept.append(line) if round_ % 50 == 0 else line.close()
    assert not reached
    for pid in ranks:
        assert len(os.listdir(f"/proc/{pid}/fd")) < 100
        limit = re.search(r"Max open files +(\d+) +(\d+)", Path(f"/proc/{pid}/limits").read_text())
        assert limit[1] == limit[2], "the ranks may open more files than their parent"
    group.call("load", {"weights": [torch.ones(5)]})
    assert torch.equal(group.call("step", {"x": torch.ones(5)}), torch.full((5,), 5.0))
    assert [rank["pid"] for rank in group.state()["ranks"]] == ranks
    for line in kept:
        line.close()


@linux
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda end: end.name)
def test_client_that_is_stopped_leaves_no_process_and_no_file(end):
    folders = [str(Path(__file__).absolute().parents[2]), str(Path(__file__).absolute().parents[1])]
    env = os.environ | {"PYTHONPATH": folders[0]}
    client = subprocess.Popen([sys.executable, "-c", CLIENT, folders[1]], env=env, stdout=subprocess.PIPE, text=True)
    directory = Path(client.stdout.readline().strip()).parent
    assert len(processes_of(directory)) == 3
    traces = Traces(directory, client.pid)
    os.kill(processes_of(directory)[-1], signal.SIGSTOP)  # a rank that cannot notice
    client.send_signal(end)
    assert traces.left(10) == []
    client.wait()
    client.stdout.close()


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
