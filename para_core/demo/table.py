"""The demo's table: the small model with and without acceleration, side by side on the same prompts and noise."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..adapters.diffusers import cache_run
from ..adapters.diffusers_quantization import quantize_model
from ..cache_report import RunReport
from ..compilation import Compilation, compiled_blocks
from ..families import family_of
from ..quantization_report import QuantizationReport
from ..residual_cache import CacheConfig
from .checker import attribute_accuracy
from .prompt import encode
from .sampling import NUM_STEPS, decode, denoise, noise
from .scene import Scene
from .weights import DEPTH, DEPTH_SINGLE

WARM_UP_STEPS = 3
NUM_BLOCK_CALLS = NUM_STEPS * (DEPTH + DEPTH_SINGLE)


@dataclass
class Row:
    """One way to run the model, and what it gave: one entry a prompt in every list.

    config None: no cache. scheme None: not quantized. num_prompts: only on the first so many, None: on all.
    latents: final ones, in any one shape.
    pictures: (prompts, H, W, 3) in 0..1, once decoded. quantization: what the scheme did to the model.
    compilation: holds what was compiled for the row's model; None: it runs as it is. num_ranks: that share a picture.
    """

    name: str
    config: CacheConfig | None = None
    scheme: str | None = None
    num_prompts: int | None = None
    seconds: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    reports: list[RunReport] = field(default_factory=list)
    pictures: Tensor | None = None
    quantization: QuantizationReport | None = None
    compilation: Compilation | None = None
    num_ranks: int = 1

    def run(self, transformer: nn.Module, prompt: str, seed: int, num_steps: int = NUM_STEPS) -> None:
        context, pooled = encode(prompt)
        tokens = noise(1, seed)
        cache = nullcontext()
        if self.config:
            cache = cache_run(transformer, self.config, num_steps=num_steps, listener=self.reports.append)
        start = time.perf_counter()
        with self._compiled(transformer), cache, torch.no_grad():
            self.latents.append(denoise(transformer, tokens, context, pooled, num_steps))
        self.seconds.append(time.perf_counter() - start)

    def _compiled(self, transformer: nn.Module) -> AbstractContextManager:
        if self.compilation is None:
            return nullcontext()
        family = family_of(transformer)
        return compiled_blocks(transformer, family, self.compilation.config, compilation=self.compilation)

    @property
    def note(self) -> str:
        """What to know about the row on this device."""
        notes = [] if self.quantization is None else [self.quantization.note]
        if self.compilation is not None:
            seconds = sum(one.seconds for one in self.compilation.compiled)
            notes.append(f"compiled in {seconds:.0f} s before, which are not counted")
        if self.num_ranks > 1:
            notes.append(f"{self.num_ranks} processes share the cores of one, and the picture is too small to gain")
        return "; ".join(filter(None, notes))


def run_rows(rows: Sequence[Row], transformer: nn.Module, autoencoder: nn.Module, prompts: Sequence[str]) -> None:
    """Run every row on every prompt. The rows take turns, so that a machine that slows down slows them all."""
    models = {None: transformer}
    for row in rows:
        if row.scheme not in models:
            models[row.scheme] = copy.deepcopy(transformer)
            row.quantization = quantize_model(models[row.scheme], row.scheme)
        elif row.scheme is not None:
            row.quantization = next(other.quantization for other in rows if other.scheme == row.scheme)
    for model in models.values():
        Row("warm-up").run(model, prompts[0], 0, WARM_UP_STEPS)
    for row in rows:
        if row.compilation is not None:
            warm_up = Row("warm-up", row.config, compilation=row.compilation)
            warm_up.run(models[row.scheme], prompts[0], 0, WARM_UP_STEPS)
    for number, prompt in enumerate(tqdm(prompts, desc=f"{len(rows)} rows on {len(prompts)} prompts", unit="prompt")):
        for row in rows:
            if row.num_prompts is None or number < row.num_prompts:
                row.run(models[row.scheme], prompt, seed=number)
    for row in rows:
        row.pictures = decode(autoencoder, torch.cat(row.latents))


def figures(rows: Sequence[Row], prompts: Sequence[str]) -> list[dict[str, object]]:
    """The figures of each row against the first, in the form of demo.json; means over the row's prompts.

    wall_s (seconds a picture) and speedup are medians, the latter of pairs that ran right after each other.
    rel_l2: of the final latent. psnr_db: of the decoded pictures, None where equal.
    quantized_memory: of the quantized layers' weights over what they take in bf16, None where there are none.
    note: what to know about this row on this device.
    """
    scenes = [Scene.parse(prompt) for prompt in prompts]
    return [_figures(row, rows[0], scenes) for row in rows]


def _figures(row: Row, baseline: Row, scenes: Sequence[Scene]) -> dict[str, object]:
    count = len(row.latents)
    pairs = zip(row.latents, baseline.latents[:count], strict=True)
    pictures = zip(scenes[:count], row.pictures.numpy(), strict=True)
    seconds = zip(baseline.seconds[:count], row.seconds, strict=True)
    return {
        "name": row.name,
        "ranks": row.num_ranks,
        "wall_s": statistics.median(row.seconds),
        "speedup": statistics.median(one / other for one, other in seconds),
        "steps": NUM_STEPS,
        "reused_steps": _mean([report.num_reused_calls for report in row.reports]),
        "block_calls": _mean([report.num_block_calls for report in row.reports]) if row.reports else NUM_BLOCK_CALLS,
        "block_calls_baseline": NUM_BLOCK_CALLS,
        "rel_l2": _mean([float((latent - expected).norm() / expected.norm()) for latent, expected in pairs]),
        "psnr_db": psnr(row.pictures, baseline.pictures[:count]),
        "quantized_memory": None if row.quantization is None else row.quantization.share_of_bf16,
        "note": row.note,
        "attribute_accuracy": _mean([attribute_accuracy(scene, picture) for scene, picture in pictures]),
    }


def psnr(pictures: Tensor, expected: Tensor) -> float | None:
    """Peak signal to noise ratio in dB of pictures in 0..1, from their common mean square error; None where equal."""
    error = float((pictures - expected).square().mean())
    return -10 * math.log10(error) if error else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
