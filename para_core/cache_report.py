"""What one sampling run with the cache did, step by step: the numbers that a person is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class StepRecord:
    """One evaluation of one conditioning. diff is None where there was nothing to compare with."""

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
    seconds: of the run; computed_seconds, reused_seconds: sums over the model calls of either kind.
    num_bytes: held for residuals at the end of the run.
    num_steps: of the schedule, 0 where it is not known. finished: the run has ended, as planned or not.
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

    def summary(self) -> str:
        """One line for the log and the node."""
        reused = ", ".join(
            f"{label} {sum(record.reused for record in records)}/{len(records)}"
            for label, records in self.conditionings.items()
        )
        line = (
            f"FBCache {self.residual_diff_threshold:g} ({self.family}): reused {reused or '0/0'}; "
            f"blocks {self.num_block_calls}/{self.num_block_calls_baseline}; {self.seconds:.2f} s, "
            f"model about {self.estimated_speedup:.2f}x; {self.num_bytes / 2**20:.1f} MiB held"
        )
        return line if self.num_reused_calls or not self.num_calls else f"{line}. {self._advice()}"

    def _advice(self) -> str:
        if self.residual_diff_threshold == 0:
            return "Nothing is reused at threshold 0."
        diffs = [record.diff for records in self.conditionings.values() for record in records if record.diff is not None]
        few_steps = max((len(records) for records in self.conditionings.values()), default=0) < 10
        why = "With fewer than 10 steps neighbouring steps differ too much. " if few_steps else ""
        smallest = f"The smallest change was {min(diffs):.3f}: " if diffs else ""
        return f"Nothing was reused. {why}{smallest}raise residual_diff_threshold or take more steps."
