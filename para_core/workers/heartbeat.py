"""Signs of life of ranks: how long they are missing, and how the ranks of several machines exchange them.

On one machine the agent watches its ranks: agent.py, rank_process.py.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from datetime import timedelta

from torch.distributed import Store

BEAT = 0.5
LONGEST_STEP = 2.0  # seconds that count between two looks
LOST_PEER = 72  # exit code
logger = logging.getLogger(__name__)


class Silence:
    """For how many seconds each peer has shown the same sign, by the clock of who looks: what the sign says is no
    matter, so no two clocks are compared and none that can be set.

    Where two looks lie further apart than LONGEST_STEP, who looks did not run either (the machine slept, a container
    was paused): no more than that counts, and the peers have their turn before they count as dead.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._looked = clock()
        self._signs: dict[Hashable, object] = {}
        self._seconds: dict[Hashable, float] = {}

    def look(self, signs: Mapping[Hashable, object]) -> dict[Hashable, float]:
        now = self._clock()
        passed, self._looked = min(now - self._looked, LONGEST_STEP), now
        same = {peer for peer, sign in signs.items() if peer in self._signs and self._signs[peer] == sign}
        self._seconds = {peer: self._seconds[peer] + passed if peer in same else 0.0 for peer in signs}
        self._signs = dict(signs)
        return self._seconds


class StoreBeats:
    """Beats from a thread, by the store that all share; each rank keeps an eye on the others.

    A rank that loses one ends, which makes the agents replace all.
    """

    def __init__(self, store: Store, rank: int, world_size: int, timeout: float) -> None:
        self._store = store
        self._rank = rank
        self._peers = [f"beat/{peer}" for peer in range(world_size) if peer != rank]
        self._timeout = timeout
        self._silence = Silence()

    def start(self) -> None:
        self._store.set_timeout(timedelta(seconds=self._timeout))
        threading.Thread(target=self._run, name="para-heartbeat", daemon=True).start()

    def silent(self) -> list[str]:
        """Beats once, and names the peers that have not for `timeout` seconds."""
        self._store.set(f"beat/{self._rank}", str(time.monotonic()))
        signs = {key: self._store.get(key) for key in self._peers if self._store.check([key])}
        return [key for key, seconds in self._silence.look(signs).items() if seconds > self._timeout]

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
