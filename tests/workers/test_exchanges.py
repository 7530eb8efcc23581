"""Errors while messages are on their way from rank to rank: they come once, and the next call finds nothing of them."""

from __future__ import annotations

import time

import pytest
import torch

from para_core.workers import WorkerError, WorkerGroup

COLLECTIVE = 6.0  # seconds


@pytest.fixture(scope="module")
def ring(group_config):
    group = WorkerGroup.start(group_config(service="workers.services:RingSession", collective_timeout=COLLECTIVE))
    yield group
    group.close()


@pytest.mark.parametrize("refused_on", [(0, 1), (0,), (1,)], ids=str)
def test_error_in_a_ring_leaves_ranks_that_go_on(ring, refused_on):
    right = {"q": torch.randn(1, 4, 16, 64), "refused_on": ()}
    wrong = {"q": torch.randn(1, 4, 16, 64), "refused_on": refused_on}
    pid, expected = ring.call("info")[-1], ring.call("attend", right)
    for _ in range(4):
        begun = time.monotonic()
        with pytest.raises(WorkerError, match=r"^rank \d raised in attend: .* size of (the )?tensor") as caught:
            ring.call("attend", wrong)
        assert caught.value.rank in refused_on and "in context_attention" in caught.value.details
        assert torch.equal(ring.call("attend", right), expected)
        assert time.monotonic() - begun < COLLECTIVE
    assert ring.call("info")[-1] == pid


def test_ranks_whose_connections_broke_are_replaced(ring):
    restarts = ring.state()["restarts"]
    with pytest.raises(WorkerError, match=r"^rank \d raised in receive: .*(Timed out waiting|closed|closure)"):
        ring.call("receive")
    assert ring.call("attend", {"q": torch.randn(1, 4, 16, 64), "refused_on": ()}).shape == (1, 4, 16, 64)
    assert ring.state()["restarts"] == restarts + 1
