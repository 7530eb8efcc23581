"""The agent's eye on client and ranks, where what it would note cannot be written."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from para_core.workers import GroupConfig, agent
from para_core.workers.agent import RankWatch
from para_core.workers.directory import GroupDirectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a group of ranks needs Linux")


class FullDisk(GroupDirectory):
    def add_death(self, rank: int, pid: int, cause: str) -> None:
        raise OSError("no space left on device")


@pytest.fixture
def ranks() -> Iterator[list[subprocess.Popen]]:
    """Two children that are no ranks, each with a process group of its own."""
    started = [subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2)]
    yield started
    for rank in started:
        rank.kill()
        rank.wait()


def announced(directory: GroupDirectory, ranks: list[subprocess.Popen]) -> None:
    for number, rank in enumerate(ranks):
        directory.rank_file(number, "json").write_text(json.dumps({"pid": rank.pid}))
        directory.set_ready(number)


@pytest.mark.parametrize("end", [9, 35], ids=["SIGKILL", "without-a-name"])
def test_rank_that_dies_takes_the_others_along(tmp_path, ranks, end):
    directory = FullDisk(tmp_path)
    announced(directory, ranks)
    RankWatch(directory, 2, heartbeat_timeout=60.0, start_timeout=60.0).look()
    ranks[0].send_signal(end)
    assert ranks[1].wait(5) == -signal.SIGKILL


def test_silent_rank_is_killed(tmp_path, ranks):
    directory = FullDisk(tmp_path)
    announced(directory, ranks)
    watch = RankWatch(directory, 2, heartbeat_timeout=-1.0, start_timeout=60.0)
    for _ in range(2):
        watch.look()
    assert [rank.wait(5) for rank in ranks] == [-signal.SIGKILL] * 2


def test_client_that_ends_takes_everything_along_whatever_a_look_meets(tmp_path, monkeypatch, ranks, caplog):
    directory = GroupDirectory.create(GroupConfig(("cpu", "cpu"), "package.module:Service"))
    announced(directory, ranks)
    parents, looks = iter([7, 7, 7, 1]), []

    def look(self: RankWatch) -> None:
        looks.append(True)
        if len(looks) == 1:
            return real(self)
        raise PermissionError(f"look {len(looks)}")

    def leave(code: int) -> None:
        raise SystemExit(code)

    real = RankWatch.look
    monkeypatch.setattr(RankWatch, "look", look)
    monkeypatch.setattr(agent.os, "getppid", lambda: next(parents))
    monkeypatch.setattr(agent.os, "_exit", leave)
    with pytest.raises(SystemExit):
        agent.watch(directory, 7)
    assert len(looks) == 4 and not directory.path.exists()
    assert [rank.wait(5) for rank in ranks] == [-signal.SIGKILL] * 2
    assert "look 2" in caplog.text


def test_ranks_that_are_killed_in_the_end_are_not_noted_in_a_folder_that_is_gone(tmp_path, ranks):
    directory, threads = GroupDirectory(tmp_path), set(threading.enumerate())
    announced(directory, ranks)
    watch = RankWatch(directory, 2, heartbeat_timeout=60.0, start_timeout=60.0)
    watch.look()
    waiting = set(threading.enumerate()) - threads
    watch.kill_all()
    for thread in waiting:
        thread.join(5)
    assert len(waiting) == 2 and directory.deaths() == []


@pytest.mark.parametrize(("end", "cause"), [(signal.SIGKILL, "SIGKILL"), (35, "signal 35"), (None, "exit code 3")])
def test_cause_of_an_end_that_the_elastic_agent_saw_first_is_in_its_log(tmp_path, monkeypatch, end, cause):
    """Its line is of a real one."""
    directory = GroupDirectory(tmp_path)
    code = 3 if end is None else -int(end)
    line = f"E1201 10:49:45.328000 14248 .venv/torch/api.py:1002] failed (exitcode: {code}) local_rank: 0 (pid: 77) of"
    directory.agent_log.write_text(f"other (pid: 77)\n{line} binary: python\n")
    watch = RankWatch(directory, 1, heartbeat_timeout=60.0, start_timeout=60.0)
    watch._living = {77: 0}
    watch._await_end(77, 0)  # no child of this process
    assert [death["cause"] for death in directory.deaths()] == [cause]


def test_the_elastic_agent_still_writes_so(group):
    directory = GroupDirectory(group.address.parent)
    os.kill(directory.pid(0), signal.SIGKILL)
    group.call("echo", 1)
    pids = "|".join(str(death["pid"]) for death in directory.deaths())
    assert re.search(agent.FAILED.format(pid=f"(?:{pids})"), directory.agent_log.read_text())
