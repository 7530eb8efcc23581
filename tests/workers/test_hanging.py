"""Ranks that live and do not finish: who says so, when, and what comes next."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from para_core.workers import Cancelled, WorkerError, WorkerGroup

COLLECTIVE, CALL = 5.0, 7.0  # seconds


@pytest.fixture(scope="module")
def group(group_config):
    times = {"collective_timeout": COLLECTIVE, "call_timeout": CALL, "heartbeat_timeout": 4.0, "failure_grace": 1.0}
    group = WorkerGroup.start(group_config(**times))
    yield group
    group.close()


def after(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def hang(group: WorkerGroup, *ranks: int, then_reduce: bool = False, patience: float = 40.0) -> object:
    return group.call("hang", {"ranks": ranks, "then_reduce": then_reduce}, cancelled=after(patience))


@pytest.mark.parametrize("rank", [0, 1])
def test_rank_that_hangs_while_the_other_has_finished(group, rank):
    restarts, begun = group.state()["restarts"], time.monotonic()
    with pytest.raises(WorkerError, match=f"^rank {rank} hangs in hang: the others finished 5 s ago") as caught:
        hang(group, rank)
    assert COLLECTIVE < time.monotonic() - begun < COLLECTIVE + 5
    assert caught.value.rank == rank
    assert f"rank {rank} was at:" in caught.value.details and f"rank {1 - rank}" not in caught.value.details
    assert "services.py" in caught.value.details and "time.sleep(0.1)" in caught.value.details
    assert "hangs in hang" in group.state()["ranks"][rank]["error"]
    assert group.call("echo", 1, cancelled=after(40)) == 1
    assert group.state()["restarts"] == restarts + 1, "the call is not made again"


def test_rank_that_hangs_while_the_other_waits_for_it_in_a_collective(group):
    with pytest.raises(WorkerError, match="^rank 0 raised in hang: .*[Tt]imed? ?out") as caught:
        hang(group, 1, then_reduce=True)
    assert "rank 1 was at:" in caught.value.details and "time.sleep(0.1)" in caught.value.details
    assert group.call("echo", 1, cancelled=after(40)) == 1


def test_all_ranks_hang(group):
    begun = time.monotonic()
    with pytest.raises(WorkerError, match="^all ranks hang in hang: none has come to a collective.* for 7 s") as caught:
        hang(group, 0, 1)
    assert CALL < time.monotonic() - begun < CALL + 5
    assert caught.value.rank is None
    assert caught.value.details.count("time.sleep(0.1)") == 2
    assert group.call("echo", 1, cancelled=after(40)) == 1


def test_call_that_goes_on_takes_as_long_as_it_takes(group):
    group.call("reduce", CALL + 2.0, cancelled=after(40))


def test_call_that_was_cancelled_and_hangs_is_waited_for_only_so_long(group, caplog):
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        hang(group, 0, 1, patience=0.5)
    with pytest.raises(Cancelled):
        group.call("echo", 1, cancelled=after(0.5))
    assert time.monotonic() - begun < 2
    assert group.call("echo", 1, cancelled=after(40)) == 1
    assert COLLECTIVE < time.monotonic() - begun
    (said,) = (record.getMessage() for record in caplog.records if "in a call that was left" in record.getMessage())
    assert said.startswith("the ranks hung for 5 s") and said.count("time.sleep(0.1)") == 2
