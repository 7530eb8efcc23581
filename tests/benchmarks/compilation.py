"""python -m tests.benchmarks.compilation: what Compile Model costs before the first picture, in ComfyUI on the CPU.

A FLUX of few channels and many blocks. Each figure comes from a process of its own that first samples uncompiled, then
compiled: CPU seconds of the second minus those of the first. Goals: a second process at most 0.25 of the first, blocks
at any number of them the same and at most 0.5 of the whole model at 24. Last, the memory of 20 runs at changing sizes.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from para_core.demo.host import find_comfyui

DEPTHS = ((2, 4), (4, 8), (8, 16))  # double and single blocks
SIZES = [(16, 2 * rows, 2 * columns) for rows in range(5, 10) for columns in range(6, 10)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1, help="how often every process runs; the least counts")
    parser.add_argument("--child", nargs=4, metavar=("SCOPE", "DOUBLE", "SINGLE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        scope, *depths, folder = args.child
        json.dump(child(scope, *map(int, depths), Path(folder), sizes=args.sizes), sys.stdout)
    else:
        measure(args.rounds)


def measure(num_rounds: int) -> None:
    found: dict[str, list[dict]] = {}
    for _ in range(num_rounds):
        for double, single in DEPTHS:
            with tempfile.TemporaryDirectory() as folder:
                found.setdefault(f"{double + single} blocks", []).append(run("blocks", double, single, folder))
                found.setdefault(f"{double + single} blocks, again", []).append(run("blocks", double, single, folder))
        with tempfile.TemporaryDirectory() as folder:
            found.setdefault("whole model", []).append(run("model", *DEPTHS[-1], folder))
            found.setdefault("whole model, again", []).append(run("model", *DEPTHS[-1], folder))
    least = {name: min(results, key=lambda result: result["cpu"]) for name, results in found.items()}
    for name, result in least.items():
        seconds = f"CPU {result['cpu']:6.1f} s  wall {result['wall']:6.1f} s"
        say(f"{name:18}  {seconds}  {result['compilations']} compilations")
    few, many = (f"{sum(depth)} blocks" for depth in (DEPTHS[0], DEPTHS[-1]))
    for name, one, other in (
        ("a second process", f"{many}, again", many),
        (f"{many} over {few}", many, few),
        ("blocks over the whole model", many, "whole model"),
    ):
        ratios = [least[one][kind] / least[other][kind] for kind in ("cpu", "wall")]
        say(f"{name}: {ratios[0]:.2f} by CPU, {ratios[1]:.2f} by wall")
    with tempfile.TemporaryDirectory() as folder:
        memory = run("blocks", *DEPTHS[0], folder, "--sizes")["memory"]
    steps = ", ".join(f"{memory[number] / 2**20:.0f}" for number in (0, 1, 4, 9, 19))
    say(f"resident MiB after run 1, 2, 5, 10, 20 at {len(SIZES)} sizes: {steps}")


def run(*arguments: object) -> dict:
    scope, double, single, folder, *more = map(str, arguments)
    command = [sys.executable, "-m", "tests.benchmarks.compilation", *more, "--child", scope, double, single, folder]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def child(scope: str, double: int, single: int, folder: Path, *, sizes: bool) -> dict:
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit("no ComfyUI found; set COMFYUI_PATH")
    sys.path[:0] = [str(comfyui), str(Path(__file__).parents[1])]
    sys.argv = sys.argv[:1]
    from comfy.cli_args import args as host_args

    host_args.cpu = host_args.use_pytorch_cross_attention = True
    import torch
    import torch._inductor.config
    from tiny_models import FLUX, build, sample

    from para_core.adapters.comfy_compile import apply_compile, last_compile_report
    from para_core.compile_config import CompileConfig

    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # compilers as children of this process, whose CPU time is known
    depths = {"depth": double, "depth_single_blocks": single}
    deep = replace(FLUX, unet_config=FLUX.unet_config | depths)
    with torch.inference_mode():
        model = build(deep)
        compiled = apply_compile(model, CompileConfig(scope), directory=folder)
        costs = [cost(lambda patcher=patcher: sample(patcher, deep, steps=1)) for patcher in (model, model, compiled)]
        memory = [used(lambda size=size: sample(compiled, deep, steps=1, latent=size)) for size in sizes * SIZES]
    cpu, wall = (compiled_cost - plain for compiled_cost, plain in zip(costs[2], costs[1], strict=True))
    return {"cpu": cpu, "wall": wall, "memory": memory, "compilations": last_compile_report(compiled).num_compilations}


def cost(work) -> tuple[float, float]:
    """CPU seconds of this process and its finished children, and wall seconds."""
    cpu, wall = cpu_seconds(), time.perf_counter()
    work()
    return cpu_seconds() - cpu, time.perf_counter() - wall


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def used(work) -> int:
    """Resident bytes of this process afterwards."""
    work()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
