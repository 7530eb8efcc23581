"""The watch over calls that do not end by themselves, because ranks hang; it runs in rank 0."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from .config import GroupConfig
from .root_store import LeadersStore
from .stacks import stacks_of
from .status import ABANDONED, sequences

INTERVAL = 0.2


@dataclass(frozen=True)
class Verdict:
    """error: the traceback of the rank that failed. hangs: else, why its ranks count as hanging, in words."""

    rank: int | None
    error: str = ""
    hangs: str = ""
    stacks: str = ""  # of the ranks that had not finished


@dataclass
class Watched:
    """One call, and since when what holds of it, by time.monotonic()."""

    number: int
    moved: float = field(default_factory=time.monotonic)
    failed: float | None = None
    finished: float | None = None
    sequences: dict[str, int] = field(default_factory=dict)


class CallWatch:
    """Ends the process, so that the agent replaces all ranks, and before that gives `report` the verdict, where

    a rank has raised, and `failure_grace` later others have not finished: they may wait for it in a collective;
    a rank has finished, and `collective_timeout` later another one has not, though it has as much to do;
    no rank has finished, and rank 0 has entered no collective for `call_timeout`;
    `given_up` says that the client waits no longer.
    """

    def __init__(
        self,
        store: LeadersStore,
        world_size: int,
        config: GroupConfig,
        *,
        given_up: Callable[[], bool],
        report: Callable[[Verdict], None],
    ) -> None:
        self._store = store
        self._ranks = range(world_size)
        self._config = config
        self._given_up = given_up
        self._report = report
        self._watched: Watched | None = None
        self._lock = threading.Lock()
        threading.Thread(target=self._run, name="para-calls", daemon=True).start()

    def begin(self, call: int) -> None:
        with self._lock:
            self._watched = Watched(call)

    def end(self) -> None:
        """All ranks have finished; once there is a verdict it does not return."""
        with self._lock:
            self._watched = None

    def _run(self) -> None:
        while True:
            time.sleep(INTERVAL)
            with self._lock:
                if self._watched is not None and (verdict := self._verdict(self._watched)):
                    self._report(verdict)
                    os._exit(ABANDONED)

    def _verdict(self, call: Watched) -> Verdict | None:
        now, config = time.monotonic(), self._config
        hanging = [rank for rank in self._ranks if not self._store.check(done_key(call.number, rank))]
        if not hanging:
            return None
        if self._store.check(failure_key(call.number)):
            call.failed = call.failed or now
            if now - call.failed > config.failure_grace:
                # By this thread's own store: the main thread may wait with the other one.
                rank, error = json.loads(self._store.get(failure_key(call.number)))
                return Verdict(rank, error, stacks=stacks_of(hanging, self._store))
        elif len(hanging) < len(self._ranks):
            call.finished = call.finished or now
            if now - call.finished > config.collective_timeout:
                return self._hang(hanging, f"the others finished {config.collective_timeout:g} s ago")
        elif (found := sequences()) != call.sequences:
            call.sequences, call.moved = found, now
        elif now - call.moved > config.call_timeout:
            return self._hang(hanging, f"none has come to a collective or an end for {config.call_timeout:g} s")
        return self._hang(hanging, "nobody waits for it any longer") if self._given_up() else None

    def _hang(self, ranks: list[int], why: str) -> Verdict:
        rank = ranks[0] if len(ranks) < len(self._ranks) else None
        return Verdict(rank, hangs=why, stacks=stacks_of(ranks, self._store))


def failure_key(call: int) -> str:
    return f"failed/{call}"


def done_key(call: int, rank: int) -> str:
    return f"done/{call}/{rank}"
