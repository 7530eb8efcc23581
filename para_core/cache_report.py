"""What one sampling run with the cache did, step by step: the numbers that a person is shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StepRecord:
    """One evaluation of one conditioning.

    diff: the estimate of the run's decision; None where there was nothing to compare with, and on a reused step where
    the outcome was clear in advance and not even the first block ran.
    """

    step: int
    sigma: float
    diff: float | None
    reused: bool


@dataclass(frozen=True)
class RunReport:
    """A finished (or running) sampling run.

    conditionings: label ("positive", "negative", ...) to its evaluations in order.
    num_calls, num_reused_calls: model calls; a batched call covers several conditionings.
    num_block_calls, num_block_calls_baseline: blocks computed, and what it would have been without the cache.
    seconds: of the run; computed_seconds, reused_seconds: sums over the model calls of either kind (`CallClock`).
    num_bytes: held for residuals at the end of the run.
    num_steps: of the schedule, 0 where it is not known. finished: the run has ended, as planned or not.
    decision, target_speedup: as in CacheConfig; with a target the threshold plays no part.
    """

    family: str
    residual_diff_threshold: float
    conditionings: dict[str, tuple[StepRecord, ...]]
    num_calls: int
    num_reused_calls: int
    num_block_calls: int
    num_block_calls_baseline: int
    seconds: float
    computed_seconds: float
    reused_seconds: float
    num_bytes: int
    num_steps: int = 0
    finished: bool = True
    decision: str = "first_block"
    target_speedup: float = 0.0

    @classmethod
    def from_dict(cls, values: Mapping) -> RunReport:
        """The report that `dataclasses.asdict` turned into `values`; other keys are passed over."""
        known = {field.name: values[field.name] for field in fields(cls)}
        known["conditionings"] = {
            label: tuple(StepRecord(**record) for record in records)
            for label, records in known["conditionings"].items()
        }
        return cls(**known)

    @property
    def estimated_speedup(self) -> float:
        """Model time without the cache over model time with it, from the mean duration of a computed call."""
        num_computed = self.num_calls - self.num_reused_calls
        total = self.computed_seconds + self.reused_seconds
        return self.num_calls * self.computed_seconds / (num_computed * total) if num_computed and total else 1.0

    @property
    def setting(self) -> str:
        """What decided, in words."""
        if self.target_speedup:
            return f"target_speedup {self.target_speedup:g}"
        return f"residual_diff_threshold {self.residual_diff_threshold:g}"

    def summary(self) -> str:
        """One line for the log."""
        reused = ", ".join(
            f"{label} {sum(record.reused for record in records)}/{len(records)}"
            for label, records in self.conditionings.items()
        )
        line = (
            f"FBCache ({self.family}, {self.decision}, {self.setting}): reused {reused or '0/0'}; "
            f"blocks {self.num_block_calls}/{self.num_block_calls_baseline}; {self.seconds:.2f} s, "
            f"model about {self.estimated_speedup:.2f}x; {self.num_bytes / 2**20:.1f} MiB held"
        )
        return f"{line}. {advice}" if (advice := self.advice()) else line

    def text(self) -> str:
        """The same for a person, a line for each fact; the last one says what to try where nothing was reused."""
        saved = 1 - self.num_block_calls / self.num_block_calls_baseline if self.num_block_calls_baseline else 0.0
        lines = [
            f"FBCache ({self.family}), decision {self.decision}, {self.setting}",
            *(_reused(label, records) for label, records in self.conditionings.items()),
            f"Blocks: {self.num_block_calls} of {self.num_block_calls_baseline} calls computed, {saved:.0%} saved",
            f"Time: {self.seconds:.2f} s measured; model about {self.estimated_speedup:.2f}x as fast (estimate)",
            f"Memory: {self.num_bytes / 2**20:.2f} MiB of residuals held",
            self.advice(),
        ]
        return "\n".join(filter(None, lines))

    def advice(self) -> str:
        """Why nothing was reused and what to try; empty where something was, or no model call was made."""
        if self.num_reused_calls or not self.num_calls:
            return ""
        if self.residual_diff_threshold == 0 and not self.target_speedup:
            return "Nothing is reused at threshold 0."
        smallest = self._smallest_difference()
        if self.target_speedup or smallest is not None and smallest < self.residual_diff_threshold:
            return "Nothing was reused: start_percent, end_percent, warmup_steps or too few steps leave no room for it."
        num_steps = self.num_steps or max((len(records) for records in self.conditionings.values()), default=0)
        why = "With fewer than 10 steps neighbouring steps differ too much. " if num_steps < 10 else ""
        known = f"The smallest difference was {smallest:.3f}. " if smallest is not None else ""
        return f"Nothing was reused. {why}{known}Raise residual_diff_threshold or take more steps."

    def _smallest_difference(self) -> float | None:
        """Of the steps; a step's is its largest, since conditionings in one batch are reused together."""
        differences: dict[int, float] = {}
        for records in self.conditionings.values():
            for record in records:
                if record.diff is not None:
                    differences[record.step] = max(record.diff, differences.get(record.step, 0.0))
        return min(differences.values(), default=None)


def _reused(label: str, records: Sequence[StepRecord]) -> str:
    # Samplers of second order evaluate a step more than once.
    unit = "steps" if len({record.step for record in records}) == len(records) else "evaluations"
    reused = [record for record in records if record.reused]
    num_foreseen = sum(record.diff is None for record in reused)
    foreseen = f", {num_foreseen} of them without even the first block" if num_foreseen else ""
    return f"{label}: {len(reused)} of {len(records)} {unit} reused{foreseen}"
