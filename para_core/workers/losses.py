"""What became of lost ranks, and how many losses in a row are too many."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from .errors import WorkerError
from .launch import LocalGroup

NOTED_WITHIN = 2.0  # seconds in which the agent writes a death down
logger = logging.getLogger(__name__)


class Losses:
    """latest: the last one, as an error. Of an attached group only the fact is known: its torchrun says more."""

    def __init__(self, local: LocalGroup | None, max_restarts: int) -> None:
        self._local = local
        self._max_restarts = max_restarts
        self._seen = 0
        self._in_a_row = 0
        self.latest: WorkerError | None = None

    def forget(self) -> None:
        """A call went well."""
        self._in_a_row = 0

    def all_ready(self) -> None:
        """Deaths until now are dealt with."""
        if self._local is not None:
            self._seen = len(self._local.directory.deaths())

    def check_start(self) -> None:
        """While the ranks start: raises WorkerError where waiting longer is of no use."""
        if self._local is None:
            return
        if failure := self._local.failure_to_start():
            rank, text = failure
            who = "the ranks" if rank is None else f"rank {rank}"
            raise WorkerError(f"{who} did not start:", rank=rank, details=text)
        deaths = self._local.directory.deaths()[self._seen :]
        if len(deaths) + self._in_a_row > self._max_restarts:
            raise self._error(deaths[-1] if deaths else None)

    def note_hung(self, seconds: float, stacks: str) -> None:
        """Ranks that a call was left to had to be replaced; nobody waits for it, so nothing is raised."""
        self.latest = WorkerError(f"the ranks hung for {seconds:g} s in a call that was left", details=stacks)
        logger.warning("%s", self.latest)

    def count(self, cause: Exception) -> None:
        """One more; raises it as WorkerError when it is one too many."""
        self.latest = self._error(self._noted(), cause)
        self._in_a_row += 1
        headline = str(self.latest).splitlines()[0]
        logger.warning("%s (loss %d in a row, %d are made good)", headline, self._in_a_row, self._max_restarts)
        if self._in_a_row > self._max_restarts:
            raise self.latest

    def not_ready(self, address: Path, seconds: float) -> WorkerError:
        """The ranks do not come, with what they wrote meanwhile where they are this machine's."""
        late = f"the group at {address} was not ready within {seconds:g} s"
        if self._local is None:
            return WorkerError(f"{late}; look at what its torchrun writes")
        found = []
        for rank in range(len(self._local.config.devices)):
            ready = "ready" if self._local.directory.is_ready(rank) else "not ready"
            found += [f"rank {rank}, {ready}:", *self._local.directory.last_lines(rank)]
        return WorkerError(f"{late}; try again when the machine is less busy", details="\n".join(found))

    def _noted(self) -> dict | None:
        deadline = time.monotonic() + NOTED_WITHIN
        while self._local is not None and self._local.alive and time.monotonic() < deadline:
            deaths = self._local.directory.deaths()
            if len(deaths) > self._seen:
                first, self._seen = deaths[self._seen], len(deaths)
                return first
            time.sleep(0.02)
        return None

    def _error(self, death: dict | None, cause: Exception | None = None) -> WorkerError:
        if death is None:
            return WorkerError(f"the ranks were lost: {cause or 'they did not come back'}")
        rank, lines = death["rank"], self._local.directory.last_lines(death["rank"])
        return WorkerError(f"rank {rank} was lost: {death['cause']}", rank=rank, details="\n".join(lines))
