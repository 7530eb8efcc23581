"""Lands a run on a target speedup: the threshold that spends the computed calls evenly over what is left of it."""

from __future__ import annotations

import math


class Budget:
    """Decides, call by call, where the computed calls of one run go.

    num_blocks: of the model; a reused call costs one of them, or none where it is not even measured. Errors are taken
    to grow with the number of calls since the last computed one as gap ** GROWTH, at a rate whose running mean is kept:
    a call is computed where its estimate exceeds what the mean rate gives at the gap that the remaining budget allows.
    Where the share AMPLE of calls can be computed, the first FIRST are: with fewer the continuation is still poor.
    Raises ValueError for a target that the number of blocks cannot give.
    """

    FIRST, AMPLE = 3, 0.4
    GROWTH = 1.0
    MEMORY = 0.8  # of the mean rate

    def __init__(self, target_speedup: float, num_blocks: int) -> None:
        if num_blocks > 1 and target_speedup >= num_blocks:
            raise ValueError(
                f"target_speedup is {target_speedup:g}; this model has {num_blocks} blocks, of which one runs "
                f"wherever it is not clear in advance: allowed is less than {num_blocks}."
            )
        self._target, self._num_blocks = target_speedup, num_blocks
        self._num_calls = self._num_reused = self._num_computed = self._gap = 0
        self._reused_blocks = 0  # that ran in reused calls
        self._log_rate: float | None = None

    def limit(self, index: int, num_steps: int) -> float:
        """What the estimate of the call at sampler step `index` of `num_steps` may be for it to be reused."""
        num_left, num_affordable = self._left(index, num_steps)
        early = self._num_computed < self.FIRST and num_affordable >= self.AMPLE * num_left
        if early or num_affordable >= num_left - 0.5 or self._log_rate is None:
            return 0.0
        if num_affordable < 0.5:
            return math.inf
        return math.exp(self._log_rate) * max(num_left / num_affordable, 1.0) ** self.GROWTH

    def allows_reuse(self, estimate: float | None, index: int, num_steps: int) -> bool:
        """Whether the call may be reused by its measured estimate; None: it can not.

        Call `note` with what became of it.
        """
        num_left, num_affordable = self._left(index, num_steps)
        if estimate is None or num_affordable >= num_left - 0.5:
            return False
        estimate = max(estimate, 1e-9)
        if num_affordable >= 0.5:
            seen = math.log(estimate) - self.GROWTH * math.log(self._gap + 1)
            last = self._log_rate
            self._log_rate = seen if last is None else self.MEMORY * last + (1 - self.MEMORY) * seen
        return num_affordable < 0.5 or estimate <= self.limit(index, num_steps)

    def has_room_to_measure(self, index: int, num_steps: int) -> bool:
        """Whether the call's block 0 can run at no computed call's expense; else what is left would not be used."""
        num_left, blocks_left = self._blocks_left(index, num_steps)
        if self._num_blocks == 1:
            return True
        num_without = round(blocks_left / self._num_blocks)
        num_with = round((blocks_left - num_left) / (self._num_blocks - 1))
        return num_with >= num_without and blocks_left - num_without * self._num_blocks >= 0.5

    def note(self, *, reused: bool, num_blocks: int = 1) -> None:
        """Count the call; num_blocks: that ran in it if it was reused."""
        self._num_calls += 1
        self._num_reused += reused
        self._num_computed += not reused
        self._reused_blocks += num_blocks if reused else 0
        self._gap = self._gap + 1 if reused else 0

    def _left(self, index: int, num_steps: int) -> tuple[float, float]:
        """How many calls are left, and how many of them can be computed."""
        num_left, blocks_left = self._blocks_left(index, num_steps)
        # What the reused ones among those that are left will cost, if they are as those so far.
        reused = (1 + self._reused_blocks) / (1 + self._num_reused)
        return num_left, (blocks_left - num_left * reused) / (self._num_blocks - reused)

    def _blocks_left(self, index: int, num_steps: int) -> tuple[float, float]:
        """How many calls are left, and how many blocks may run in them."""
        calls_per_step = max(1.0, self._num_calls / index) if index else 1.0
        num_left = max(1.0, (num_steps - index) * calls_per_step)
        total = (self._num_calls + num_left) * self._num_blocks / self._target
        return num_left, total - self._num_computed * self._num_blocks - self._reused_blocks
