"""Ranks that start slowly, not in time, or not at all."""

from __future__ import annotations

import os
import signal

import pytest

from para_core.workers import WorkerError
from para_core.workers.directory import GroupDirectory


def test_rank_that_lets_no_thread_run_while_it_starts(start):
    group = start(service="workers.services:SlowToStart", heartbeat_timeout=1.5)
    assert group.call("echo", 1) == 1 and group.state()["restarts"] == 0
    directory = GroupDirectory(group.address.parent)
    os.kill(directory.pid(1), signal.SIGKILL)
    assert group.call("echo", 2) == 2 and group.state()["restarts"] == 1
    assert [death["cause"] for death in directory.deaths()] == ["SIGKILL"]


def test_ranks_that_are_not_ready_in_time_are_one_error_with_what_they_wrote(start):
    late, logs = "was not ready within 2 s; try again", r"\nrank 0, not ready:\n(.*\n)*rank 1, not ready:"
    with pytest.raises(WorkerError, match=f"{late}.*{logs}"):
        start(service="workers.services:SlowToStart", start_timeout=2.0)


def test_rank_that_cannot_even_start_is_one_error(start, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('a torch that is none')")
    with pytest.raises(WorkerError, match="did not start|was lost") as caught:
        start(environment={"PYTHONPATH": str(tmp_path)})
    assert "a torch that is none" in str(caught.value)


def test_service_that_cannot_be_made_is_one_error(start):
    with pytest.raises(WorkerError, match="no such model") as caught:
        start(service="workers.services:Broken")
    assert caught.value.rank == 1
