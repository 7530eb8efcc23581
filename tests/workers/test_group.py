"""The group as its client sees it: calls, losses, cancelling, ends."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from para_core.workers import Cancelled, Shared, WorkerError


@pytest.fixture
def loaded(group):
    """The shared group with weights loaded, and `recover` that loads them again; (group, the calls of recover)."""
    recovered = []

    def load():
        group.call("load", {"weights": Shared([torch.full((3,), 2.0)])})

    def recover():
        recovered.append(True)
        load()

    load()
    group.recover = recover
    yield group, recovered
    group.recover = None


def harm(folder, *harms):
    """The payload entry that does each (rank, signal) once."""
    files = [folder / f"harm{index}" for index in range(len(harms))]
    for file in files:
        file.touch()
    return [[rank, int(number), str(file)] for (rank, number), file in zip(harms, files, strict=True)]


def test_every_kind_of_value_comes_back_as_it_went(group):
    sent = {"none": None, "list": [True, 1, 2.5, "ä\ud800", b"\0\xff"], 3: {"deep": [[], {}]}, "long": "x" * 5000}
    assert group.call("echo", sent) == sent


def test_call_runs_in_inference_mode_on_every_rank(group):
    rank, world_size, device, inference, _ = group.call("info")
    assert [rank, world_size, device, inference] == [0, 2, "cpu", True]


def test_results_are_the_caller_s_to_keep_and_to_write_to(group):
    kept = []
    for number in range(6):
        given = torch.full((600, 700), float(number))
        kept.append(group.call("echo", {"x": given, "small": [given[:2, :2]]}))
        kept[-1]["x"] += 10
        del given
    group.call("echo", torch.zeros(600, 700))
    for number, result in enumerate(kept):
        assert not result["x"].is_inference() or torch.is_inference_mode_enabled()
        assert torch.equal(result["x"], torch.full((600, 700), number + 10.0))
        assert torch.equal(result["small"][0], torch.full((2, 2), float(number)))


def test_borrowed_tensors_are_each_rank_s_own(group):
    sent = torch.arange(300_000.0)  # more than one page
    for factor in (1, 3):
        given = sent * factor
        here, *found = group.call("scale", given)
        assert torch.equal(here, given * 2) and torch.equal(found[0], given * 2)
        assert torch.equal(found[1], given * 3)
        assert torch.equal(given, sent * factor)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_is_replaced_and_the_call_replayed(loaded, tmp_path, rank):
    group, recovered = loaded
    expected = group.call("step", {"x": torch.ones(3)})
    payload = {"x": torch.ones(3), "harm": harm(tmp_path, (rank, signal.SIGKILL))}
    assert torch.equal(group.call("step", payload), expected)
    assert len(recovered) == 1
    assert group.call("info")[0] == 0


def test_rank_killed_between_two_calls(loaded):
    group, recovered = loaded
    expected = group.call("step", {"x": torch.ones(3)})
    os.kill(group.state()["ranks"][1]["pid"], signal.SIGKILL)
    assert torch.equal(group.call("step", {"x": torch.ones(3)}), expected)
    assert len(recovered) == 1


def test_a_call_that_is_not_worth_new_ranks_leaves_them_to_the_next(loaded):
    group, recovered = loaded
    expected = group.call("step", {"x": torch.ones(3)})
    os.kill(group.state()["ranks"][1]["pid"], signal.SIGKILL)
    with pytest.raises(WorkerError, match="rank 1 was lost: SIGKILL"):
        group.call("step", {"x": torch.ones(3)}, renew=False)
    with pytest.raises(WorkerError, match="the ranks are new, and step was not to wait"):
        group.call("step", {"x": torch.ones(3)}, renew=False)
    assert recovered == []
    assert torch.equal(group.call("step", {"x": torch.ones(3)}), expected)
    assert torch.equal(group.call("step", {"x": torch.ones(3)}, renew=False), expected)
    assert len(recovered) == 1


def test_ranks_killed_while_they_load_and_again_while_they_recover(loaded, tmp_path):
    group, recovered = loaded
    expected = group.call("step", {"x": torch.ones(3)})
    first, again = harm(tmp_path, (1, signal.SIGKILL), (0, signal.SIGKILL))
    weights = Shared([torch.full((3,), 2.0)])

    def recover():
        recovered.append(True)
        group.call("load", {"weights": weights, "harm": [again]})

    group.recover = recover
    group.call("load", {"weights": weights, "harm": [first]})
    assert len(recovered) == 2 and torch.equal(group.call("step", {"x": torch.ones(3)}), expected)


def test_error_on_one_rank_comes_with_its_traceback_and_leaves_the_group_up(group):
    pid = group.call("info")[-1]
    with pytest.raises(WorkerError, match="rank 1 does not like it") as caught:
        group.call("fail", {"ranks": [1], "then_reduce": False})
    assert caught.value.rank == 1 and "services.py" in caught.value.details
    assert str(caught.value).splitlines()[0] == "rank 1 raised in fail: ValueError: rank 1 does not like it"
    assert group.call("info")[-1] == pid


@pytest.mark.parametrize("rank", [0, 1])
def test_error_on_one_rank_while_another_waits_for_it(group, rank):
    begun = time.monotonic()
    with pytest.raises(WorkerError, match=f"rank {rank} does not like it") as caught:
        group.call("fail", {"ranks": [rank], "then_reduce": True})
    assert caught.value.rank == rank and time.monotonic() - begun < 10
    assert group.call("echo", 1) == 1


def test_cancelled_call_is_left_at_once_and_the_next_one_waits_for_it(group):
    pid = group.call("info")[-1]
    cancel = threading.Event()
    threading.Timer(0.3, cancel.set).start()
    begun = time.monotonic()
    with pytest.raises(Cancelled):
        group.call("sleep", 2.0, cancelled=cancel.is_set)
    assert time.monotonic() - begun < 1.0
    assert group.state()["ranks"][0]["state"] == "busy"
    assert group.call("info")[-1] == pid and time.monotonic() - begun >= 2.0


def test_what_cancelled_raises_passes_through(group):
    class Interrupted(BaseException):
        pass

    def interrupt():
        raise Interrupted

    with pytest.raises(Interrupted):
        group.call("sleep", 0.2, cancelled=interrupt)
    assert group.call("echo", 5) == 5


def test_call_that_takes_too_long_says_where_the_ranks_are(group):
    with pytest.raises(WorkerError, match="no answer to sleep within 0.5 s") as caught:
        group.call("sleep", 60.0, timeout=0.5)
    assert "services.py" in caught.value.details and "in sleep" in caught.value.details
    assert group.call("echo", 1) == 1


def test_payload_larger_than_ever_and_small_again(group):
    for count in (10, 3_000_000, 5_000_000, 7):
        sent = torch.arange(count, dtype=torch.float32)
        assert torch.equal(group.call("echo", {"x": sent})["x"], sent)


def test_stopped_rank_counts_as_lost(start, tmp_path):
    group = start(heartbeat_timeout=4.0)
    group.recover = lambda: group.call("load", {"weights": [torch.ones(3)]})
    group.recover()
    payload = {"x": torch.ones(3), "harm": harm(tmp_path, (1, signal.SIGSTOP))}
    begun = time.monotonic()
    assert group.call("step", payload).tolist() == [5.0] * 3
    assert time.monotonic() - begun < 60 and group.state()["restarts"] == 1
    assert "no sign of life for 4 s" in group.state()["ranks"][1]["error"]


def test_state_shows_each_rank(group):
    group.call("echo", 1)
    state = group.state()
    assert state["address"] == str(group.address)
    for rank, shown in enumerate(state["ranks"]):
        assert [shown["rank"], shown["device"], shown["state"]] == [rank, "cpu", "idle"]
        assert shown["pid"] > 0 and shown["memory_bytes"] > 10_000_000


def test_method_that_may_not_be_called(group):
    with pytest.raises(ValueError, match="'_harm' cannot be called"):
        group.call("_harm", {})
    with pytest.raises(WorkerError, match="no method 'absent'"):
        group.call("absent", {})


def test_three_kills_in_a_row_end_in_one_error_and_a_new_group_starts(start, tmp_path):
    group = start(max_restarts=2)
    group.recover = lambda: group.call("load", {"weights": [torch.ones(3)]})
    group.recover()
    payload = {"x": torch.ones(3), "harm": harm(tmp_path, *[(1, signal.SIGKILL)] * 3)}
    with pytest.raises(WorkerError, match="rank 1 was lost: SIGKILL") as caught:
        group.call("step", payload)
    assert caught.value.rank == 1 and not group.alive
    with pytest.raises(WorkerError, match="closed"):
        group.call("echo", 1)
    assert start().call("echo", 1) == 1


def test_close_twice(start):
    group = start()
    directory = group.address.parent
    assert directory.stat().st_mode & 0o777 == 0o700
    group.close()
    group.close()
    assert not directory.exists() and not group.alive
