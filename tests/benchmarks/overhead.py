"""python -m tests.benchmarks.overhead: what the cache costs in ComfyUI on the demo model.

Two ratios from paired runs: a step at threshold 0 over a step without the node (to stay under 1.02), and a reused
step over a step of the same model cut down to its embedders, block 0 and final layer (to stay under 1.2). Then the
share of a computed step in which the cache's own code runs (to stay under 1 %), from within the same steps.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from para_core.demo.host import find_comfyui


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--size", type=int, default=128, help="pixels; the demo model was trained at 128")
    args = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("no ComfyUI found; set COMFYUI_PATH")
    sys.path.insert(0, str(comfyui))
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args as host_args

    host_args.cpu = host_args.use_pytorch_cross_attention = True
    import torch

    with torch.inference_mode():
        measure(args.pairs, args.size // 8)
        for size in sorted({args.size, 512}):
            measure_bookkeeping(size // 8)


def measure(num_pairs: int, side: int) -> None:
    import comfy.sd
    from torch import nn

    from para_core.adapters.comfy_fbcache import apply_fbcache
    from para_core.demo.weights import TRANSFORMER_FILE
    from para_core.residual_cache import CacheConfig

    model, cut = (comfy.sd.load_diffusion_model(str(TRANSFORMER_FILE)) for _ in range(2))
    cut.model.diffusion_model.double_blocks = nn.ModuleList([cut.model.diffusion_model.double_blocks[0]])
    cut.model.diffusion_model.single_blocks = nn.ModuleList()
    variants = {
        "plain": model,
        "threshold 0": apply_fbcache(model, CacheConfig(0.0)),
        "reused": apply_fbcache(model, CacheConfig(1000.0)),
        "block 0 only": cut,
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(num_pairs + 1):
        for name, patcher in variants.items():
            seconds = step_seconds(patcher, side)
            if number:  # the first round warms up
                times[name].append(seconds)
    for one, other in (("threshold 0", "plain"), ("reused", "block 0 only"), ("reused", "plain")):
        ratios = [a / b for a, b in zip(times[one], times[other], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        sys.stdout.write(
            f"{one} / {other}: {statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f}, {num_pairs} pairs; "
            f"{statistics.median(times[one]) * 1e3:.2f} / {statistics.median(times[other]) * 1e3:.2f} ms a step)\n"
        )


def measure_bookkeeping(side: int) -> None:
    """Steps that are all computed, though everything is measured and kept."""
    import comfy.sd
    import torch

    from para_core.adapters import comfy_fbcache
    from para_core.demo.weights import TRANSFORMER_FILE
    from para_core.residual_cache import CacheConfig

    torch.set_num_threads(1)
    model = comfy.sd.load_diffusion_model(str(TRANSFORMER_FILE))
    for settings in ({"decision": "first_block"}, *({"decision": "prediction", "order": order} for order in (0, 1, 2))):
        with OwnTime() as own:
            total = sum(step_durations(comfy_fbcache.apply_fbcache(model, CacheConfig(1e-12, **settings)), side))
        words = " ".join(map(str, settings.values()))
        sys.stdout.write(f"bookkeeping, {words}, {side // 2} x {side // 2} image tokens: {own.seconds / total:.2%}\n")


class OwnTime:
    """Within the context: the seconds that the cache's code takes, less what it calls of the host and the model."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._stack: list[float] = []  # of each of our frames, what it spent in others' code

    def __enter__(self) -> OwnTime:
        from unittest import mock

        from para_core.adapters import comfy_fbcache
        from para_core.first_block import CachedCall

        block, apply_model = CachedCall.block, comfy_fbcache._apply_model

        def timed_block(call, stack, index, arguments, compute, **options):
            return self._ours(block, call, stack, index, arguments, lambda: self._theirs(compute), **options)

        def timed_apply_model(executor, *args, **kwargs):
            theirs = Executor(executor, self._theirs)
            return self._ours(apply_model, theirs, *args, **kwargs)

        self._patches = [
            mock.patch.object(CachedCall, "block", timed_block),
            mock.patch.object(comfy_fbcache, "_apply_model", timed_apply_model),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *_) -> None:
        for patch in self._patches:
            patch.stop()

    def _ours(self, function, *args, **kwargs):
        start = time.perf_counter()
        self._stack.append(0.0)
        try:
            return function(*args, **kwargs)
        finally:
            duration = time.perf_counter() - start
            self.seconds += duration - self._stack.pop()

    def _theirs(self, function, *args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            self._stack[-1] += time.perf_counter() - start


class Executor:
    """The host's, timed as its own code."""

    def __init__(self, executor, timed) -> None:
        self._executor, self._timed = executor, timed
        self.class_obj = executor.class_obj

    def __call__(self, *args, **kwargs):
        return self._timed(self._executor, *args, **kwargs)


def step_seconds(patcher, side: int) -> float:
    """The median duration of a model call in one 28-step run, the first (never reused) one left out."""
    return statistics.median(step_durations(patcher, side)[1:])


def step_durations(patcher, side: int) -> list[float]:
    import comfy.sample
    import comfy.samplers
    import torch

    from para_core.demo.prompt import encode

    durations = []

    def timed(model, x, sigmas, extra_args, callback, disable, **_):
        for sigma in sigmas[:-1]:
            start = time.perf_counter()
            model(x, sigma[None], **extra_args)
            durations.append(time.perf_counter() - start)
        return x

    context, pooled = encode("a red circle top left, a blue square bottom right, on grey")
    conditioning = [[context, {"pooled_output": pooled}]]
    latent = torch.zeros(1, 16, side, side)
    sigmas = torch.linspace(1, 0, 29)
    sampler = comfy.samplers.KSAMPLER(timed)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
    comfy.sample.sample_custom(
        patcher, noise, 1.0, sampler, sigmas, conditioning, conditioning, latent, disable_pbar=True, seed=0
    )
    return durations


if __name__ == "__main__":
    main()
