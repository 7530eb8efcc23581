"""The caches that are compared: ours in all variants that exist, and those of diffusers and cache-dit."""

from __future__ import annotations

import importlib.metadata
import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, fields

import torch
from diffusers import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from torch import nn

from para_core.adapters.diffusers import cache_run
from para_core.residual_cache import CacheConfig

from .samplers import Schedule
from .subject import Subject, velocity_of

OURS, PLAIN, EXTRAPOLATING = "ours", "plain", "extrapolating"
BUDGETS = (0.25, 0.5, 0.7)
NEVER = 1e-30  # a threshold: every block goes through our cache and nothing is reused; at 0 no block does
DBCACHE_WARMUP = 8  # steps, the default of cache-dit 1.5


@dataclass
class Method:
    """One cache with one free setting; `off` is the value at which it must give the uncached result."""

    name: str
    group: str
    off: object = 0.0

    def prepare(self, subject: Subject, schedule: Schedule) -> None:
        """Whatever the library wants to know in advance."""

    def settings(self, schedule: Schedule) -> Sequence[object] | None:
        """All values to choose from; None for a threshold that may be any number, larger saving more."""
        return None

    @contextmanager
    def applied(self, transformer: nn.Module, setting: object, schedule: Schedule) -> Iterator[None]:
        """The cache on a fresh transformer, for one run."""
        raise NotImplementedError


@dataclass
class Ours(Method):
    """para_core's, with the settings `config` next to the threshold."""

    off: float = NEVER
    config: dict[str, object] = field(default_factory=dict)

    @contextmanager
    def applied(self, transformer: nn.Module, setting: float, schedule: Schedule) -> Iterator[None]:
        config = CacheConfig(residual_diff_threshold=setting, **self.config)
        with cache_run(transformer, config, num_steps=schedule.num_steps):
            yield


@dataclass
class OursAtSpeedup(Ours):
    """para_core's, told nothing but the speedup that each budget is; how near it lands shows in its points."""

    off: float = 1.0

    def settings(self, schedule: Schedule) -> Sequence[float]:
        return [1 / (1 - budget) for budget in BUDGETS]

    @contextmanager
    def applied(self, transformer: nn.Module, setting: float, schedule: Schedule) -> Iterator[None]:
        asked = {"residual_diff_threshold": NEVER} if setting == self.off else {"target_speedup": setting}
        with cache_run(transformer, CacheConfig(**asked, **self.config), num_steps=schedule.num_steps):
            yield


@dataclass
class FirstBlockCache(Method):
    @contextmanager
    def applied(self, transformer: nn.Module, setting: float, schedule: Schedule) -> Iterator[None]:
        transformer.enable_cache(FirstBlockCacheConfig(threshold=setting))
        yield


@dataclass
class MagCache(Method):
    """With ratios calibrated on these weights and this schedule, on a prompt that is not measured."""

    max_skip_steps: int = 3
    ratios: dict[Schedule, list[float]] = field(default_factory=dict)

    def prepare(self, subject: Subject, schedule: Schedule) -> None:
        transformer, case, printed = subject.fresh(), subject.cases[-1], io.StringIO()
        transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=schedule.num_calls))
        with torch.no_grad(), redirect_stdout(printed):
            schedule.sample(velocity_of(transformer, case), case.tokens)
        # The library gives the ratios to nobody but the screen.
        self.ratios[schedule] = next(json.loads(line) for line in printed.getvalue().splitlines() if line[:2] == "[1")
        assert len(self.ratios[schedule]) == schedule.num_calls

    @contextmanager
    def applied(self, transformer: nn.Module, setting: float, schedule: Schedule) -> Iterator[None]:
        config = MagCacheConfig(
            threshold=setting,
            max_skip_steps=self.max_skip_steps,
            num_inference_steps=schedule.num_calls,
            mag_ratios=self.ratios[schedule],
        )
        transformer.enable_cache(config)
        yield


@dataclass
class TaylorSeer(Method):
    """diffusers' own: a fixed interval, the first three calls computed; one setting is (interval, first reused call).

    whole: predicts the model's output only (its "lite" mode); otherwise every attention module's output, and computes
    all the rest.
    """

    off: tuple[int, int] = (1, 3)
    order: int = 1
    whole: bool = False

    def settings(self, schedule: Schedule) -> Sequence[tuple[int, int]]:
        late = [(2, round(share * schedule.num_calls)) for share in (0.75, 0.6, 0.45, 0.3)]
        return [*late, *((interval, 3) for interval in (2, 3, 4, 5, 6, 8, 10))]

    @contextmanager
    def applied(self, transformer: nn.Module, setting: tuple[int, int], schedule: Schedule) -> Iterator[None]:
        config = TaylorSeerCacheConfig(
            cache_interval=setting[0],
            disable_cache_before_step=setting[1],
            max_order=self.order,
            taylor_factors_dtype=torch.float32,
            use_lite_mode=self.whole,
        )
        transformer.enable_cache(config)
        yield


@dataclass
class DBCache(Method):
    """cache-dit: F first and B last blocks are always computed; order 0 is without its TaylorSeer."""

    first: int = 1
    last: int = 0
    order: int = 0
    warmup_steps: int = 0

    @contextmanager
    def applied(self, transformer: nn.Module, setting: float, schedule: Schedule) -> Iterator[None]:
        import cache_dit

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=self.first,
            Bn_compute_blocks=self.last,
            residual_diff_threshold=setting,
            max_warmup_steps=self.warmup_steps,
            num_inference_steps=schedule.num_calls,
            enable_separate_cfg=False,
        )
        calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=self.order) if self.order else None
        cache_dit.enable_cache(transformer, cache_config=config, calibrator_config=calibrator)
        assert "_original_forward" in vars(transformer), "cache-dit took this copy for one that it had seen"
        yield


def all_methods() -> list[Method]:
    """Every method that runs in diffusers, whether its library is here or not."""
    interval = {"diffusers TaylorSeer": False, "diffusers TaylorSeer lite": True}
    return [
        *our_methods(),
        FirstBlockCache("diffusers FBC", PLAIN),
        MagCache("diffusers MagCache K3", PLAIN, max_skip_steps=3),
        MagCache("diffusers MagCache K8", PLAIN, max_skip_steps=8),
        *(
            TaylorSeer(f"{name} o{order}", EXTRAPOLATING, order=order, whole=whole)
            for name, whole in interval.items()
            for order in (1, 2)
        ),
        *db_caches(),
    ]


def db_caches() -> Iterator[DBCache]:
    """cache-dit's, without a warm-up as all others run, and with the one that it has by default."""
    settings = [(first, last, 0) for first, last in ((1, 0), (4, 0), (4, 4))]
    settings += [(first, 0, DBCACHE_WARMUP) for first in (1, 4)]
    for first, last, warmup in settings:
        for order in (0, 1, 2):
            name = f"cache-dit F{first}B{last}" + (f" W{warmup}" if warmup else "")
            name += f" + TaylorSeer o{order}" if order else ""
            group = EXTRAPOLATING if order else PLAIN
            yield DBCache(name, group, first=first, last=last, order=order, warmup_steps=warmup)


def our_methods() -> Iterator[Method]:
    """One for each variant that the fields of CacheConfig allow today."""
    known = {entry.name for entry in fields(CacheConfig)}
    orders = (0, 1, 2) if "order" in known else (None,)
    decisions = ("first_block", "prediction") if "decision" in known else (None,)
    variants = []
    for decision in decisions:
        for order in orders:
            chosen = {"order": order, "decision": decision}
            name = f"ours o{order or 0}" + (", prediction" if decision == "prediction" else "")
            variants.append((name, {key: value for key, value in chosen.items() if value is not None}))
    yield from (Ours(name, OURS, config=config) for name, config in variants)
    if "target_speedup" in known:
        name, config = variants[-1]
        yield OursAtSpeedup(f"{name}, target_speedup", OURS, config=config)


def missing(method: Method) -> str | None:
    """Why the method cannot run here."""
    if isinstance(method, DBCache):
        logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
        try:
            importlib.metadata.version("cache-dit")
        except importlib.metadata.PackageNotFoundError:
            return "cache-dit is not installed; run: pip install -e '.[benchmark]'"
    return None
