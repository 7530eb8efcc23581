"""Foresees the estimate of a step that is not measured, from those of the run's measured steps; plain floats."""

from __future__ import annotations

import math
from collections.abc import Sequence


class Forecast:
    """How large the estimate is at which distance from the computed steps.

    A polynomial through the computed steps misses by the product of the distances to them, the plain change is as the
    distance to the newest one, and the estimate is the geometric mean of both. The ratio of what was measured to that
    is what this run teaches; newer steps count more.
    """

    MEMORY = 0.5
    REACH = 2.0  # times the distance that was measured last: further the law has not been seen to hold

    def __init__(self) -> None:
        self._log_rate: float | None = None
        self._distance = self._direction = 0.0
        self._num_times = 0

    def learn(self, estimate: float, times: Sequence[float], at: float) -> None:
        """A measured step: its estimate, and the times of the computed ones before it, newest first."""
        law = _law(times, at)
        if law > 0:
            seen = math.log(max(estimate, 1e-12) / law)
            last = self._log_rate if len(times) == self._num_times else None  # the rate of another power of time
            self._num_times = len(times)
            self._log_rate = seen if last is None else self.MEMORY * last + (1 - self.MEMORY) * seen
            self._distance, self._direction = abs(at - times[0]), math.copysign(1.0, at - times[0])

    def at(self, times: Sequence[float], at: float) -> float | None:
        """The estimate to expect at a time; None where it has to be measured.

        That is where nothing has been measured yet, or only with fewer computed steps or much nearer to one, and where
        samplers ask again for a time or go back.
        """
        law = _law(times, at)
        if self._log_rate is None or len(times) != self._num_times:
            return None
        if law == 0 or abs(at - times[0]) > self.REACH * self._distance:
            return None
        if (at - times[0]) * self._direction < 0:
            return None
        return math.exp(self._log_rate) * law


def _law(times: Sequence[float], at: float) -> float:
    """0 at the time of a computed step."""
    return math.sqrt(abs(at - times[0]) * math.prod(abs(at - time) for time in times)) if times else 0.0
