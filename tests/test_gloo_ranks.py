"""The group that the distributed tests share: it reports what goes wrong, goes on afterwards and leaves no process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import gloo_cases
import pytest
from gloo_ranks import RanksFailed

SUM = "gloo_cases.sum_of_ranks"


def test_ranks_are_joined_and_stay_up(gloo_ranks):
    (first, second), (again, _) = (gloo_ranks(2).run(SUM, factor=factor) for factor in (10, 20))
    assert first[0] == second[0] == 10
    assert again == (20, first[1]), "another process ran the second case"


def test_exception_is_reported_with_rank_and_traceback(gloo_ranks):
    with pytest.raises(RanksFailed, match=r"^rank 1 of 2 failed in gloo_cases.raise_on_one: Traceback") as error:
        gloo_ranks(2).run("gloo_cases.raise_on_one")
    assert "ValueError: the reason" in str(error.value) and "rank 0" not in str(error.value)
    assert gloo_ranks(2).run(SUM, factor=1)[0][0] == 1


def test_death_is_reported_by_its_signal_and_the_group_replaced(gloo_ranks):
    with pytest.raises(RanksFailed, match=r"rank 1 of 2 failed in gloo_cases.die_on_one: the process died: SIGFPE"):
        gloo_ranks(2).run("gloo_cases.die_on_one")
    assert gloo_ranks(2).run(SUM, factor=1)[0][0] == 1


def test_hang_is_bounded_and_located(gloo_ranks):
    start = time.monotonic()
    with pytest.raises(
        RanksFailed,
        match=r"rank 1 of 2 failed in gloo_cases.hang_on_one: no answer in time(?s:.*)"
        r"gloo_cases.py.*in hang_on_one",
    ):
        gloo_ranks(2).run("gloo_cases.hang_on_one", timeout=2)
    assert time.monotonic() - start < 10


def test_ranks_end_with_a_killed_test_process():
    parent = subprocess.Popen([sys.executable, gloo_cases.__file__], stdout=subprocess.PIPE, text=True)
    ranks = [int(word) for word in parent.stdout.readline().split()]
    assert len(ranks) == 2 and all(map(alive, ranks))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 5
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, ranks))


def test_ranks_have_the_host(gloo_ranks, comfyui):
    files = gloo_ranks(2, comfyui=comfyui).run("gloo_cases.host_module")
    assert [Path(file) for file in files] == [comfyui / "nodes.py"] * 2


def alive(process_id: int) -> bool:
    """A zombie, which its new parent has yet to reap, is not."""
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{process_id}/stat")
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
