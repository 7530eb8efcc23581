"""A group that the user started with torchrun, here by two agents on two loopback addresses."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch
from two_machines import two_agents

from para_core.workers import Shared, WorkerError, attach

TESTS = Path(__file__).absolute().parents[1]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="127.0.0.2 is an address on Linux")


@pytest.fixture(scope="module")
def attached(tmp_path_factory):
    command = "torchrun --nnodes=2 --nproc-per-node=1 --max-restarts=3 --rdzv-backend=c10d --rdzv-endpoint=HOST:PORT"
    command += " -m para_core.workers --service=workers.services:Session --heartbeat-timeout=5"
    environment = {"PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)])}
    folder = tmp_path_factory.mktemp("attached")
    with two_agents(command.split(), folder / "group.sock", environment, folder) as address:
        group = attach(address, start_timeout=120)
        yield group
        group.close()


def test_call_reaches_both_machines(attached):
    assert attached.call("info")[:2] == [0, 2] and attached.config.devices == ("cpu", "cpu")
    attached.call("load", {"weights": Shared([torch.full((3,), 2.0)])})
    assert attached.call("step", {"x": torch.ones(3)}).tolist() == [8.0] * 3
    state = attached.state()
    assert [rank["state"] for rank in state["ranks"]] == ["idle", "idle"]


def test_second_client_is_refused_at_once_and_the_first_goes_on(attached):
    with pytest.raises(WorkerError, match="has another client"):
        attach(attached.address)
    assert attached.call("echo", 1) == 1


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


def test_ranks_that_take_too_long_say_where_they_are_and_are_replaced(attached):
    with pytest.raises(WorkerError, match="no answer to sleep within 1 s") as caught:
        attached.call("sleep", 600.0, timeout=1.0)
    assert [caught.value.details.count(f"rank {rank} was at:") for rank in range(2)] == [1, 1]
    assert caught.value.details.count("in sleep") == 2
    assert attached.call("info")[:2] == [0, 2]


def test_address_where_no_group_is(tmp_path):
    with pytest.raises(ValueError, match="start one"):
        attach(tmp_path / "nothing")
