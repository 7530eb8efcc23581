"""A group of one rank in the process of the tests, and a MODEL that samples on it."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch


@dataclass
class Context:
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")


class InProcess:
    """A group of one rank that answers at once. calls: the methods that were asked for."""

    alive = connected = True

    def __init__(self):
        from para_core.adapters.comfy_rank import Service
        from para_core.workers import GroupConfig

        self.config = GroupConfig(("cpu",), "unused:Service")
        self.recover = None
        self.service = Service(Context())
        self.calls = []

    def call(self, method, payload, *, cancelled=None, renew=True):
        if cancelled is not None:
            cancelled()
        from para_core.workers import Shared

        self.calls.append(method)
        payload = {name: value.tensors if isinstance(value, Shared) else value for name, value in payload.items()}
        # The ranks' memory is this process's own here: what unloads it is the host already.
        return None if method == "unload" else getattr(self.service, method)(payload)

    def turn(self, cancelled=None):
        """For the test alone: a rank's memory management is the test's own here, which no other thread may touch."""
        from para_core.workers import WorkerError

        if threading.current_thread() is not threading.main_thread():
            raise WorkerError("this group has no process of its own")
        return nullcontext()

    def state(self):
        return {"address": "here", "restarts": 0, "ranks": [{"rank": 0, "device": "cpu", "memory_bytes": 3 * 2**20}]}


def dying(group, dies):
    """From now on the group's ranks are lost and replaced before those of the run's `forward` calls that dies(number)
    names, counted from 0."""
    from para_core.adapters.comfy_rank import Service

    original, numbers = group.call, iter(range(1000))

    def call(method, payload, **settings):
        if method == "forward" and dies(next(numbers)):
            group.service, group.call = Service(Context()), original
            group.recover()
            group.call = call
        return original(method, payload, **settings)

    group.call = call


def cancelled_once_asked(group, method):
    """The next call of the method is cancelled while the ranks work on it, which they do to its end."""
    from comfy.model_management import InterruptProcessingException

    original = group.call

    def call(asked, payload, **settings):
        answer = original(asked, payload, **settings)
        if asked == method:
            group.call = original
            raise InterruptProcessingException
        return answer

    group.call = call
    return pytest.raises(InterruptProcessingException)


@pytest.fixture
def elsewhere(comfy):
    """Makes a MODEL sample on the group; the group is its second result."""
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.adapters.comfy_session import Session
    from para_core.parallel_config import ParallelConfig

    group = InProcess()
    session = Session(group)

    def parallel(model, **settings):
        return apply_parallel(model, ParallelConfig(("cpu",), **settings), lambda config: session)

    parallel.group = group
    return parallel
