"""Services that the groups of these tests run, in the ranks' processes."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from para_core.attention import AXES, RankMesh, context_attention


class Session:
    """Echoes, computes across ranks from what was loaded before, and fails on demand."""

    borrowing = ("scale",)

    def __init__(self, context):
        self.context = context
        self.weights = None

    def echo(self, payload):
        return payload

    def info(self, payload):
        context = self.context
        return [context.rank, context.world_size, str(context.device), torch.is_inference_mode_enabled(), os.getpid()]

    def load(self, payload):
        self._harm(payload)
        self.weights = payload["weights"]

    def step(self, payload):
        """Adds rank + 1 times the weights to x, over all ranks."""
        self._harm(payload)
        total = payload["x"] + self.weights[0] * (self.context.rank + 1)
        dist.all_reduce(total)
        return total

    def scale(self, payload):
        """Writes into what it has borrowed; every rank's result."""
        payload.mul_(self.context.rank + 2)
        dist.barrier()  # now all have written
        found = [torch.empty_like(payload) for _ in range(self.context.world_size)]
        dist.all_gather(found, payload.clone())
        return [payload, *found]

    def fail(self, payload):
        if self.context.rank in payload["ranks"]:
            raise ValueError(f"rank {self.context.rank} does not like it")
        if payload["then_reduce"]:
            dist.all_reduce(torch.ones(1))

    def sleep(self, payload):
        time.sleep(payload)
        return payload

    def hang(self, payload):
        """On these ranks, and not in a collective."""
        while self.context.rank in payload["ranks"]:
            time.sleep(0.1)
        if payload["then_reduce"]:
            dist.all_reduce(torch.ones(1))

    def reduce(self, payload):
        """Again and again, for about that many seconds."""
        for _ in range(int(payload * 10)):
            time.sleep(0.1)
            dist.all_reduce(torch.ones(1))

    def _harm(self, payload):
        """Once for each file: {"harm": [[rank, signal, file], ...]}."""
        for rank, number, file in payload.get("harm", ()):
            if rank == self.context.rank and os.path.exists(file):
                os.unlink(file)
                os.kill(os.getpid(), number)
                if number == signal.SIGSTOP:
                    time.sleep(0.5)
                return
        time.sleep(0.05)


class RingSession(Session):
    """Attention on a ring of all ranks, and what breaks the connections between them."""

    def __init__(self, context):
        super().__init__(context)
        self.mesh = RankMesh.of(init_device_mesh("cpu", (1, context.world_size, 1), mesh_dim_names=AXES))

    def attend(self, payload):
        """q: the same on all ranks. refused_on: the ranks whose kernel gets a mask that does not fit."""
        q, size = payload["q"], self.context.world_size
        mask = None
        if self.context.rank in payload["refused_on"]:
            mask = torch.ones(1, 1, 2, q.shape[2] * size, dtype=torch.bool)
        return context_attention(
            q * (self.context.rank + 1), q, q, mesh=self.mesh, lengths=[q.shape[2]] * size, mask=mask
        )

    def receive(self, payload):
        """What no rank sends."""
        dist.recv(torch.empty(1), src=1 - self.context.rank)


class FarSession(Session):
    """The last rank stands for one of another machine: it cannot open the first one's memory."""

    def __init__(self, context):
        super().__init__(context)
        if context.rank == context.world_size - 1:
            calls = sys.modules["para_core.workers.calls"]
            calls._open = self._refuse

    def sums(self, payload):
        """Of every tensor of the payload, by rank."""
        own = torch.stack([tensor.double().sum() for tensor in payload])
        found = torch.zeros(self.context.world_size, len(payload), dtype=torch.float64)
        found[self.context.rank] = own
        dist.all_reduce(found)
        return found

    def timeouts(self, payload):
        """Seconds of every process group that rank 0 is in."""
        groups = dist.distributed_c10d._world.pg_map
        return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]

    @staticmethod
    def _refuse(*arguments):
        raise OSError("not on this machine")


class Broken:
    def __init__(self, context):
        if context.rank == 1:
            raise ValueError("no such model")


class SlowToStart(Session):
    """Lets no other thread run while it starts, as Python does while it maps a large library."""

    def __init__(self, context):
        super().__init__(context)
        ctypes.PyDLL(None).sleep(4)
