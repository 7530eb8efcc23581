"""A group that is closed while a call runs: by its own thread or another one, at any moment of the call."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import pytest
import torch
from workers.services import Session

from para_core.workers import GroupConfig, WorkerContext, WorkerError, WorkerGroup, attach
from para_core.workers.directory import write_private
from para_core.workers.private_store import PrivateRoot
from para_core.workers.server import Leader

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a group of ranks needs Linux")
KEY, PAYLOAD = bytes(32), torch.arange(500_000.0)


@pytest.fixture
def group(tmp_path) -> Iterator[WorkerGroup]:
    """One rank, in a thread of this process."""
    config, context = GroupConfig(("cpu",), "workers.services:Session"), WorkerContext(0, 1, torch.device("cpu"))
    root = PrivateRoot(tmp_path, "0", 0, 1, KEY, timedelta(seconds=20))
    leader, address = Leader(context, Session(context), root, config), tmp_path / "rank0.sock"
    write_private(tmp_path / "rank0.sock.key", KEY)
    threading.Thread(target=leader.run, args=(address, KEY), daemon=True).start()
    group = attach(address)
    yield group
    group.close()


def closed_by_another_thread(group: WorkerGroup) -> None:
    thread = threading.Thread(target=group.close)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def with_close_after(group: WorkerGroup, function: Callable) -> Callable:
    def called(*given: object, **named: object) -> object:
        result = function(*given, **named)
        closed_by_another_thread(group)
        return result

    return called


def hook_in(group: WorkerGroup, moment: str) -> None:
    line = group._line
    owner, name = {
        "before it is sent": (line._outbox, "reserve"),
        "before it is awaited": (line._connection, "send"),
        "after the answer": (line._connection, "receive"),
        "while it is read": (line._answers, "message"),
    }[moment]
    setattr(owner, name, with_close_after(group, getattr(owner, name)))


@pytest.mark.parametrize("moment", ["before it is sent", "before it is awaited"])
def test_close_by_another_thread_before_the_answer_ends_the_call(group, moment):
    hook_in(group, moment)
    with pytest.raises(WorkerError, match="^the group is closed"):
        group.call("echo", PAYLOAD)
    assert_nothing_is_held(group)


@pytest.mark.parametrize("moment", ["after the answer", "while it is read"])
def test_close_by_another_thread_after_the_answer_came_leaves_it(group, moment):
    assert torch.equal(group.call("echo", PAYLOAD), PAYLOAD)
    hook_in(group, moment)
    assert torch.equal(group.call("echo", PAYLOAD), PAYLOAD)
    assert_nothing_is_held(group)
    with pytest.raises(WorkerError, match="^the group is closed"):
        group.call("echo", PAYLOAD)


@pytest.mark.parametrize("close", [WorkerGroup.close, closed_by_another_thread], ids=["own", "another"])
def test_close_in_a_hook_ends_the_call(group, close):
    def cancelled() -> bool:
        close(group)
        return False

    with pytest.raises(WorkerError, match="^the group is closed"):
        group.call("sleep", 1.0, cancelled=cancelled)
    assert_nothing_is_held(group)


@pytest.mark.parametrize("close", [WorkerGroup.close, closed_by_another_thread], ids=["own", "another"])
def test_close_while_recovering_ends_the_call(group, close):
    group.recover, group._recovery._incarnation = (lambda: close(group)), None
    with pytest.raises(WorkerError, match="^the group is closed"):
        group.call("echo", PAYLOAD)
    assert_nothing_is_held(group)


def assert_nothing_is_held(group: WorkerGroup) -> None:
    line = group._line
    assert line._connection is None and line._outbox.memory is None and not line._answers._buffers
    assert not group.alive and not group.connected


def test_group_that_is_closed_by_another_thread_while_its_ranks_start(group_config):
    made, shown, asked = [], [], []

    def close(group):
        shown.append(group.state())
        asked.append(time.monotonic())
        group.close()

    def close_soon(group):
        made.append(group)
        threading.Timer(0.5, close, [group]).start()

    with pytest.raises(WorkerError, match="^the group is closed"):
        WorkerGroup.start(group_config(), made=close_soon)
    assert time.monotonic() - asked[0] < 3  # ready after about as long
    assert [rank["state"] for rank in shown[0]["ranks"]] == ["starting", "starting"]
    assert not made[0].alive and not made[0].address.parent.exists()
