"""Who counts as silent: clocks that jump and machines that sleep make nobody so."""

from __future__ import annotations

import os
import time

import pytest
from torch.distributed import HashStore

from para_core.workers import agent
from para_core.workers.agent import RankWatch
from para_core.workers.directory import GroupDirectory
from para_core.workers.heartbeat import Silence, StoreBeats


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def silences(steps: list[tuple[float, object]]) -> list[float]:
    """Of one peer, after each (seconds that pass, sign that it shows then)."""
    clock, found = Clock(), []
    silence = Silence(clock)
    for passed, sign in steps:
        clock.now += passed
        found.append(silence.look({"peer": sign})["peer"])
    return found


def test_silence_is_counted_from_the_latest_sign_that_differs():
    assert silences([(1, 5), (1, 5), (1, 6), (1, 6), (1, 6)]) == [0, 1, 0, 1, 2]
    assert silences([(1, 5), (1, 3), (1, 3)]) == [0, 0, 1], "a clock was set back"


def test_a_sleep_of_all_counts_little():
    assert silences([(1, 5), (3600, 5), (0.25, 5), (0.25, 6)]) == [0, 2, 2.25, 0]


def test_a_peer_that_was_away_begins_anew():
    clock = Clock()
    silence = Silence(clock)
    for signs in ({"a": 1}, {"a": 1}, {}, {"a": 1}):
        clock.now += 1
        found = silence.look(signs)
    assert found == {"a": 0}


def test_ranks_of_two_machines():
    store = HashStore()
    first, second = (StoreBeats(store, rank, 2, 3.0) for rank in range(2))
    clock = Clock()
    for beats in (first, second):
        beats._silence = Silence(clock)
    assert first.silent() == second.silent() == first.silent() == []
    for _ in range(3):
        clock.now += 1.1
        found = first.silent()
    assert found == ["beat/1"] and second.silent() == []


@pytest.fixture
def killed(monkeypatch):
    """The pids that the agent kills, of processes that do not exist."""
    found = []
    monkeypatch.setattr(agent, "kill_process_group", found.append)
    monkeypatch.setattr(agent.threading, "Thread", lambda **_: type("Idle", (), {"start": lambda self: None})())
    monkeypatch.setattr(RankWatch, "_is_child", staticmethod(lambda pid: True))
    return found


def test_agent_has_more_patience_with_a_rank_that_starts(tmp_path, killed):
    directory, clock = GroupDirectory(tmp_path), Clock()
    watch = RankWatch(directory, 1, heartbeat_timeout=4.0, start_timeout=8.0)
    watch._silence = Silence(clock)

    def silent_for() -> int:
        """Seconds after which a silent rank is killed."""
        begun, count = clock.now, len(killed)
        while len(killed) == count and clock.now - begun < 20:
            clock.now += 1
            watch.look()
        return int(clock.now - begun)

    for pid, ready, seconds in ((100, False, 9), (101, True, 5), (102, False, 9)):
        directory.rank_file(0, "json").write_text(f'{{"pid": {pid}}}')
        directory.rank_file(0, "beat").write_text("")  # as a new process does
        watch.look()
        if ready:
            directory.set_ready(0)
            watch.look()
        assert silent_for() == seconds
    assert killed == [100, 101, 102]
    causes = [death["cause"] for death in directory.deaths()]
    assert causes == [f"no sign of life for {seconds} s" for seconds in (8, 4, 8)]


def test_agent_kills_the_rank_that_is_silent_and_none_because_of_the_time_of_day(tmp_path, killed):
    directory, clock = GroupDirectory(tmp_path), Clock()
    for rank in range(2):
        directory.rank_file(rank, "json").write_text(f'{{"pid": {100 + rank}}}')
        directory.set_ready(rank)
    watch = RankWatch(directory, 2, heartbeat_timeout=4.0, start_timeout=60.0)
    watch._silence = Silence(clock)
    day, now = 86400, time.time()
    for second in range(7):
        watch.look()
        assert not killed or second > 4
        clock.now += 1
        shown = now + second + (day if second < 3 else -day)  # set back meanwhile
        os.utime(directory.rank_file(0, "beat"), (shown, shown))
    assert set(killed) == {101}
    assert {death["rank"]: death["cause"] for death in directory.deaths()} == {1: "no sign of life for 4 s"}
