"""Where a rank is: the stack of its main thread, which runs the calls. By the store, for signals reach one machine."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from collections.abc import Iterable

from .channel import ConnectionLost
from .root_store import ControlStore, LeadersStore
from .status import shortened

ASKED = "stacks"
WITHIN = 2.0  # seconds for a rank to answer


def own_stack() -> str:
    frame = sys._current_frames()[threading.main_thread().ident]
    return "".join(traceback.format_stack(frame))


class StackTeller:
    """Waits, in a thread with a store of its own, until rank 0 asks where this rank is."""

    def __init__(self, store: ControlStore, rank: int) -> None:
        self._store = store
        self._rank = rank
        threading.Thread(target=self._run, name="para-stacks", daemon=True).start()

    def _run(self) -> None:
        try:
            self._store.get(ASKED)
            self._store.set(_key(self._rank), own_stack())
        except (ConnectionLost, RuntimeError):
            return  # rank 0 is gone: this process is next


def stacks_of(ranks: Iterable[int], store: LeadersStore) -> str:
    """On rank 0, once in its life: where these ranks are. One whose interpreter does not run cannot say so."""
    ranks, found = list(ranks), {0: own_stack()}
    store.set(ASKED, "1")
    deadline = time.monotonic() + WITHIN
    while (missing := [rank for rank in ranks if rank not in found]) and time.monotonic() < deadline:
        found |= {rank: store.get(_key(rank)) for rank in missing if store.check(_key(rank))}
        time.sleep(0.02)
    return shortened("\n".join(f"rank {rank} was at:\n{found.get(rank, '  (no answer)')}" for rank in ranks))


def _key(rank: int) -> str:
    return f"stack/{rank}"
