"""Signs of life between the ranks of several machines; on one machine the agent watches them (rank_process.py)."""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import timedelta

from torch.distributed import Store

BEAT = 0.5
LOST_PEER = 72  # exit code
logger = logging.getLogger(__name__)


class StoreBeats:
    """Beats from a thread, by the store that all share; each rank keeps an eye on the others.

    A rank that loses one ends, which makes the agents replace all.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self._store = store
        self._rank = rank
        self._peers = [f"beat/{peer}" for peer in range(world_size) if peer != rank]
        self._timeout = timeout
        self._latest: dict[str, tuple[bytes, float]] = {}

    def start(self) -> None:
        self._store.set_timeout(timedelta(seconds=self._timeout))
        threading.Thread(target=self._run, name="para-heartbeat", daemon=True).start()

    def silent(self) -> list[str]:
        """Beats once, and names the peers that have not for `timeout` seconds."""
        now = time.monotonic()
        self._store.set(f"beat/{self._rank}", str(now))
        for key in self._peers:
            if self._store.check([key]) and (value := self._store.get(key)) != self._latest.get(key, (None,))[0]:
                self._latest[key] = value, now
        return [key for key, (_, since) in self._latest.items() if now - since > self._timeout]

    def _run(self) -> None:
        while True:
            try:
                lost = self.silent()
            except RuntimeError as error:
                lost = [f"the store: {error}"]
            if lost:
                logger.error("rank %d: no sign of life from %s; ending", self._rank, ", ".join(lost))
                os._exit(LOST_PEER)
            time.sleep(BEAT)
