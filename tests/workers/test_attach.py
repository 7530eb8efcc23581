"""A group that the user started with torchrun, here by two agents on two loopback addresses."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from para_core.workers import Shared, WorkerError, attach

TESTS = Path(__file__).absolute().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux")


def agent(host: str, port: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--max-restarts=3"]
    command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", f"--local-addr={host}", "--rdzv-id=test"]
    command += [f"--rdzv-conf=is_host={int(host == '127.0.0.1')}", "--monitor-interval=0.1"]
    command += ["-m", "para_core.workers", "--service=workers.services:Session", "--heartbeat-timeout=5", *arguments]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]), "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, env=env | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    """The client's machine is the second address, whose rank elastic need not make its first."""
    address = tmp_path_factory.mktemp("attached") / "group.sock"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [agent("127.0.0.1", port), agent("127.0.0.2", port, f"--address={address}")]
    deadline = time.monotonic() + 120
    while not address.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    group = attach(address, start_timeout=120)
    yield group
    group.close()
    for process in agents:
        process.terminate()
    for process in agents:
        process.wait(40)


def test_call_reaches_both_machines(attached):
    assert attached.call("info")[:2] == [0, 2] and attached.config.devices == ("cpu", "cpu")
    attached.call("load", {"weights": Shared([torch.full((3,), 2.0)])})
    assert attached.call("step", {"x": torch.ones(3)}).tolist() == [8.0] * 3
    state = attached.state()
    assert [rank["state"] for rank in state["ranks"]] == ["idle", "idle"]


def test_only_the_user_can_read_key_and_socket(attached):
    for path in (attached.address, attached.address.with_name("group.sock.key")):
        assert path.stat().st_mode & 0o077 == 0


def test_error_on_the_other_machine(attached):
    with pytest.raises(WorkerError, match="rank 1 does not like it") as caught:
        attached.call("fail", {"ranks": [1], "then_reduce": False})
    assert caught.value.rank == 1


def test_rank_killed_on_the_other_machine_is_replaced(attached, tmp_path):
    recovered = []

    def recover():
        recovered.append(True)
        attached.call("load", {"weights": Shared([torch.full((3,), 2.0)])})

    attached.recover = recover
    (tmp_path / "harm").touch()
    payload = {"x": torch.ones(3), "harm": [[1, int(signal.SIGKILL), str(tmp_path / "harm")]]}
    assert attached.call("step", payload).tolist() == [8.0] * 3
    assert recovered == [True]


def test_address_where_no_group_is(tmp_path):
    with pytest.raises(ValueError, match="start one"):
        attach(tmp_path / "nothing")
