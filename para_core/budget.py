"""Lands a run on a target speedup: the threshold that spends the computed calls evenly over what is left of it."""

from __future__ import annotations

import math


class Budget:
    """Decides, call by call, where the computed calls of one run go.

    num_blocks: of the model; a reused call costs one of them. Errors are taken to grow with the number of calls since
    the last computed one as gap ** GROWTH, at a rate whose running mean is kept: a call is computed where its estimate
    exceeds what the mean rate gives at the gap that the remaining budget allows. Raises ValueError for a target that
    the number of blocks cannot give.
    """

    GROWTH = 1.5
    MEMORY = 0.8  # of the mean rate

    def __init__(self, target_speedup: float, num_blocks: int) -> None:
        share = (1 / target_speedup - 1 / num_blocks) / (1 - 1 / num_blocks) if num_blocks > 1 else 1.0
        if share <= 0:
            raise ValueError(
                f"target_speedup is {target_speedup:g}; this model has {num_blocks} blocks, of which one always runs: "
                f"allowed is less than {num_blocks}."
            )
        self._computed_share = share
        self._num_calls = self._num_computed = self._gap = 0
        self._log_rate: float | None = None

    def allows_reuse(self, estimate: float | None, index: int, num_steps: int) -> bool:
        """Whether the call at sampler step `index` of `num_steps` may be reused; estimate None: it can not.

        Call `note` with what became of it.
        """
        calls_per_step = max(1.0, self._num_calls / index) if index else 1.0
        num_left = max(1.0, (num_steps - index) * calls_per_step)
        budget = self._computed_share * (self._num_calls + num_left) - self._num_computed
        if estimate is None or budget >= num_left:
            return False
        if budget < 0.5:
            return True
        gap = self._gap + 1
        seen = math.log(max(estimate, 1e-9)) - self.GROWTH * math.log(gap)
        self._log_rate = seen if self._log_rate is None else self.MEMORY * self._log_rate + (1 - self.MEMORY) * seen
        affordable = max(num_left / budget, 1.0)
        return seen + self.GROWTH * math.log(gap) <= self._log_rate + self.GROWTH * math.log(affordable)

    def note(self, *, reused: bool) -> None:
        """Count the call."""
        self._num_calls += 1
        self._num_computed += not reused
        self._gap = self._gap + 1 if reused else 0
