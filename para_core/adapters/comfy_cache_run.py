"""ComfyUI: one sampling run of a MODEL with the first-block cache: its steps on the noise schedule, and its report."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from ..cache_report import RunReport
from ..cache_run import CacheRun
from ..families import ModelFamily
from ..residual_cache import CacheConfig
from ..run_state import Step

TELL_INTERVAL = 0.05  # building a report costs as much as a small model's block


@dataclass
class RunLog:
    """The report of the latest run of a MODEL; all clones behind one patcher share it."""

    report: RunReport | None = None


@dataclass(frozen=True)
class FBCacheOption:
    """What the FBCache Patcher leaves on a MODEL.

    listener: called with the report while a run goes on, and when it has ended.
    """

    family: ModelFamily
    config: CacheConfig
    listener: Callable[[RunReport], None] | None = None
    log: RunLog = field(default_factory=RunLog)

    def __deepcopy__(self, memo: dict) -> FBCacheOption:
        return self  # ComfyUI 0.3 copies the options of every clone


@dataclass
class SamplingRun:
    """One sampling run: its cache, and the noise schedule on the host side, which is fetched from the device once.

    sigma_range: highest and lowest sigma at which reuse is allowed.
    time_of: what the model is conditioned on at a sigma; steps: by sigma, as asked so far.
    hooked: hooks change the weights from step to step (a scheduled LoRA).
    num_bytes: of residuals in other processes; None where they are in this one.
    seen: the keys of what the sampler's current evaluation has asked of the model so far; None outside of one.
    """

    cache: CacheRun
    option: FBCacheOption
    sigma_range: tuple[float, float]
    time_of: Callable[[float], float]
    schedule: list[float] | None = None
    steps: dict[float, Step] = field(default_factory=dict)
    told: float = 0.0
    hooked: bool = False
    num_bytes: int | None = None
    seen: set[Hashable] | None = None

    def tell(self, *, finished: bool) -> RunReport | None:
        """Give the listener the report as it stands; while the run goes on at most every TELL_INTERVAL seconds, and
        not at all where there is nothing to tell but that nothing is reused."""
        now = time.perf_counter()
        if not finished and (self.option.listener is None or self.cache.off or now - self.told < TELL_INTERVAL):
            return None
        self.told = now
        num_steps = len(self.schedule) - 1 if self.schedule else 0
        report = self.cache.report(num_steps=num_steps, finished=finished, num_bytes=self.num_bytes)
        if self.option.listener is not None:
            self.option.listener(report)
        return report

    def step(self, options: Mapping) -> Step:
        sigma = float(options["sigmas"][0])
        if self.schedule is None:
            self.schedule = options["sample_sigmas"].tolist() if "sample_sigmas" in options else [sigma]
        if sigma not in self.steps:
            self.steps[sigma] = self._step(sigma)
        return self.steps[sigma]

    def _step(self, sigma: float) -> Step:
        # Samplers evaluate between the schedule's sigmas too (dpm_2, ancestral): the nearest one counts.
        index = min(range(len(self.schedule)), key=lambda i: abs(self.schedule[i] - sigma))
        following = self.schedule[min(index + 1, len(self.schedule) - 1)]
        return Step(
            index,
            sigma,
            allowed=self.sigma_range[1] <= sigma <= self.sigma_range[0],
            at=None if self.cache.off else self.time_of(sigma),
            width=abs(self.schedule[index] - following),
            num_steps=len(self.schedule) - 1,
        )
