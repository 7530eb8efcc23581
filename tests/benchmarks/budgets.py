"""The error of a method at given shares of block calls saved: settings are searched, all prompts measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MEASURED_WITHIN = 0.004  # of a budget: such a point is taken as it is
EXTRAPOLATED_WITHIN = 0.04  # of a budget, where there are points on one side only
TOLERANCE = 0.01  # of the threshold search
RANGE = (2.0**-24, 2.0**14)  # of thresholds
MAX_TRIES = 8


@dataclass(frozen=True)
class Figures:
    """Means over the prompts. saved: share of block calls; psnr_db is None where there are no pictures or no error."""

    saved: float
    rel_l2: float
    psnr_db: float | None = None
    attribute_accuracy: float | None = None


@dataclass(frozen=True)
class Budget:
    """A method's figures at one budget. how: measured, interpolated, extrapolated, or out of reach (figures None)."""

    how: str
    figures: Figures | None = None


class ThresholdSearch:
    """Finds thresholds by the share saved, which `saved` tells for a threshold at the cost of some runs."""

    def __init__(self, saved: Callable[[float], float]) -> None:
        self._saved = saved
        self._known: dict[float, float] = {}  # threshold to share

    def find(self, share: float, start: float) -> float | None:
        """The threshold that saves nearest to `share`, within TOLERANCE if one does; None if it is out of reach.

        start: where the search begins; the nearer, the shorter it is.
        """
        if self._at(RANGE[1]) < share - TOLERANCE:
            return None
        low, high = self._bracket(share, start)
        for _ in range(MAX_TRIES):
            nearest = min(self._known, key=lambda threshold: abs(self._known[threshold] - share))
            if abs(self._known[nearest] - share) <= TOLERANCE or high / low < 1.001:
                break
            rise = self._known[high] - self._known[low]
            part = min(max((share - self._known[low]) / rise if rise else 0.5, 0.15), 0.85)
            middle = low * (high / low) ** part
            low, high = (middle, high) if self._at(middle) < share else (low, middle)
        return nearest

    def _at(self, threshold: float) -> float:
        if threshold not in self._known:
            self._known[threshold] = self._saved(threshold)
        return self._known[threshold]

    def _bracket(self, share: float, start: float) -> tuple[float, float]:
        """Two thresholds, the lower one saving less than `share`, the higher one not less."""
        above = [threshold for threshold, saved in self._known.items() if saved >= share]
        below = [threshold for threshold, saved in self._known.items() if saved < share]
        low, high = max(below, default=RANGE[0]), min(above, default=RANGE[1])
        threshold, factor = min(max(start, low), high), 1.25
        rising = self._at(threshold) < share
        while rising and self._at(threshold) < share and threshold < high:
            low, threshold, factor = threshold, min(threshold * factor, high), factor * factor
        while not rising and self._at(threshold) >= share and threshold > low:
            high, threshold, factor = threshold, max(threshold / factor, low), factor * factor
        return (low, threshold) if rising else (threshold, high)


def nearest_settings(saved: dict[object, float], budgets: Sequence[float]) -> list[object]:
    """Of settings with known savings, those next to a budget on either side."""
    chosen = {}
    for budget in budgets:
        below = [setting for setting in saved if saved[setting] <= budget]
        above = [setting for setting in saved if saved[setting] > budget]
        chosen |= dict.fromkeys([max(below, key=saved.get)] if below else [])
        chosen |= dict.fromkeys([min(above, key=saved.get)] if above else [])
    return sorted(chosen, key=saved.get)


def at_budget(points: Sequence[Figures], budget: float) -> Budget:
    """The figures at a budget from those of some settings, linear in log error between its two neighbours."""
    below = [point for point in points if point.saved <= budget]
    above = [point for point in points if point.saved > budget]
    ordered = sorted(points, key=lambda point: abs(point.saved - budget))
    if ordered and abs(ordered[0].saved - budget) <= MEASURED_WITHIN:
        return Budget("measured", ordered[0])
    if below and above:
        pair = max(below, key=lambda point: point.saved), min(above, key=lambda point: point.saved)
        return Budget("interpolated", _between(*pair, budget))
    if len(ordered) > 1 and abs(ordered[0].saved - budget) <= EXTRAPOLATED_WITHIN:
        return Budget("extrapolated", _between(*sorted(ordered[:2], key=lambda point: point.saved), budget))
    return Budget("out of reach")


def _between(one: Figures, other: Figures, saved: float) -> Figures:
    if one.saved == other.saved or not one.rel_l2 or not other.rel_l2:
        return other
    part = (saved - one.saved) / (other.saved - one.saved)

    def mix(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a + part * (b - a)

    return Figures(
        saved,
        math.exp(mix(math.log(one.rel_l2), math.log(other.rel_l2))),
        mix(one.psnr_db, other.psnr_db),
        mix(one.attribute_accuracy, other.attribute_accuracy),
    )
