"""Measures one method on one schedule: what every prompt gives at each setting, and the figures at the budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from para_core.demo.checker import attribute_accuracy
from para_core.demo.host import find_comfyui
from para_core.demo.scene import Scene
from para_core.demo.table import psnr

from .budgets import Budget, Figures, ThresholdSearch, at_budget, nearest_settings
from .easycache import EasyCache, Host
from .methods import Method
from .samplers import Schedule
from .subject import BlockCalls, Subject, velocity_of

NUM_PROBES = 3  # prompts on which thresholds are searched
START = 0.1  # the first threshold that is tried, unless another schedule has found one
EXACT = 1e-5  # relative L2 of a switched-off method to the baseline that rounding may cause
CORRECTED_FROM = 0.02  # of a budget: all prompts together save so much more or less than the probes


@dataclass(frozen=True)
class Task:
    """One method on one schedule. method None: the uncached baseline itself."""

    schedule: Schedule
    method: Method | None
    budgets: tuple[float, ...]


@dataclass
class Measured:
    """What a task gave. settings and points belong together; off_error: of the method switched off, to the baseline."""

    task: Task
    settings: list[object] = field(default_factory=list)
    points: list[Figures] = field(default_factory=list)
    at: dict[float, Budget] = field(default_factory=dict)
    off_error: float = 0.0
    accuracy: float | None = None
    seconds: float = 0.0


class Bench:
    """The subject in this process, with the baselines and, once it is needed, ComfyUI.

    folder: where the baselines of diffusers lie for all processes.
    """

    def __init__(self, subject: Subject, folder: Path) -> None:
        torch.set_num_threads(1)  # further threads only wait for each other on models this small
        self.subject = subject
        self.folder = folder
        self.found: dict[tuple[str, float], float] = {}  # thresholds by method and budget, of other schedules
        self._host: Host | None = None

    def host(self) -> Host:
        self._host = self._host or Host(find_comfyui(), self.subject)
        return self._host

    def measure(self, task: Task) -> Measured:
        """Carry out a task. Raises AssertionError where a library does not do what its row would claim."""
        start = time.perf_counter()
        result = self._baseline(task) if task.method is None else Measurement(self, task).result()
        result.seconds = time.perf_counter() - start
        return result

    def run(self, method: Method, setting: object, number: int, schedule: Schedule) -> tuple[Tensor, float]:
        """The final tokens of prompt `number`, and the share of block calls saved."""
        case = self.subject.cases[number]
        if isinstance(method, EasyCache):
            return self.host().run(setting, case, schedule)
        transformer = self.subject.fresh()
        calls = BlockCalls(transformer, self.subject.attention_shares)
        with torch.no_grad(), method.applied(transformer, setting, schedule):
            latent = schedule.sample(velocity_of(transformer, case), case.tokens)
        return latent, calls.saved(schedule.num_calls)

    def baseline(self, schedule: Schedule, *, in_host: bool = False) -> Tensor:
        """The final tokens of all prompts without a cache."""
        if in_host:
            return self._all(lambda number: self.host().run(None, self.subject.cases[number], schedule)[0])
        return torch.load(self._file(schedule))

    def _baseline(self, task: Task) -> Measured:
        def run(number: int) -> Tensor:
            case = self.subject.cases[number]
            return task.schedule.sample(velocity_of(self.subject.fresh(), case), case.tokens)

        with torch.no_grad():
            latents = self._all(run)
        torch.save(latents, self._file(task.schedule))
        return Measured(task, accuracy=self.accuracy(self.subject.pictures(latents)))

    def accuracy(self, pictures: Tensor | None) -> float | None:
        """The mean attribute accuracy of the decoded pictures of all prompts."""
        if pictures is None:
            return None
        scenes = [Scene.parse(case.prompt) for case in self.subject.cases[: len(pictures)]]
        return sum(map(attribute_accuracy, scenes, pictures.numpy())) / len(scenes)

    def _all(self, run: Callable[[int], Tensor]) -> Tensor:
        return torch.cat([run(number) for number in range(self.subject.num_prompts)])

    def _file(self, schedule: Schedule) -> Path:
        return self.folder / f"{schedule.sampler}_{schedule.num_steps}.pt"


class Measurement:
    """The runs of one task, each done once."""

    def __init__(self, bench: Bench, task: Task) -> None:
        self.bench, self.task = bench, task
        self.method, self.schedule = task.method, task.schedule
        self._runs: dict[tuple[object, int], tuple[Tensor, float]] = {}
        self._expected = bench.baseline(self.schedule, in_host=isinstance(self.method, EasyCache))
        self._expected_pictures = bench.subject.pictures(self._expected)

    def result(self) -> Measured:
        self.method.prepare(self.bench.subject, self.schedule)
        result = Measured(self.task, off_error=self._off_error())
        result.accuracy = self.bench.accuracy(self._expected_pictures)
        available = self.method.settings(self.schedule)
        if available is None:
            self._measure_thresholds(result)
        else:
            saved = {setting: self._saved([0], setting) for setting in available}
            for setting in nearest_settings(saved, self.task.budgets):
                self._add(result, setting)
        result.at = {budget: at_budget(result.points, budget) for budget in self.task.budgets}
        return result

    def _measure_thresholds(self, result: Measured) -> None:
        probes = range(min(NUM_PROBES, self.bench.subject.num_prompts))
        search, found = ThresholdSearch(lambda threshold: self._saved(probes, threshold)), self.bench.found
        for budget in self.task.budgets:
            place = self.method.name, budget
            threshold = search.find(budget, found.get(place, START))
            if threshold is None:
                continue
            figures = self._add(result, threshold)
            found[place] = threshold
            if abs(figures.saved - budget) > CORRECTED_FROM:
                aim = budget + self._saved(probes, threshold) - figures.saved
                threshold = search.find(aim, threshold)
                if threshold is not None and threshold not in result.settings:
                    self._add(result, threshold)

    def _run(self, setting: object, number: int) -> tuple[Tensor, float]:
        if (setting, number) not in self._runs:
            self._runs[setting, number] = self.bench.run(self.method, setting, number, self.schedule)
        return self._runs[setting, number]

    def _saved(self, numbers: Sequence[int], setting: object) -> float:
        return sum(self._run(setting, number)[1] for number in numbers) / len(numbers)

    def _off_error(self) -> float:
        latent, saved = self._run(self.method.off, 0)
        error = rel_l2(latent, self._expected[:1])
        assert error <= EXACT and abs(saved) < 1e-9, f"switched off it is {error:.1e} from no cache and saves {saved}"
        return error

    def _add(self, result: Measured, setting: object) -> Figures:
        numbers = range(self.bench.subject.num_prompts)
        latents = torch.cat([self._run(setting, number)[0] for number in numbers])
        pairs = zip(latents, self._expected, strict=True)
        pictures = self.bench.subject.pictures(latents)
        figures = Figures(
            self._saved(numbers, setting),
            sum(rel_l2(latent, expected) for latent, expected in pairs) / len(numbers),
            None if pictures is None else psnr(pictures, self._expected_pictures),
            self.bench.accuracy(pictures),
        )
        result.settings.append(setting)
        result.points.append(figures)
        return figures


def rel_l2(latent: Tensor, expected: Tensor) -> float:
    return float((latent - expected).norm() / expected.norm())
