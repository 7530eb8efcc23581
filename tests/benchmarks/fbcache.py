"""python -m tests.benchmarks.fbcache: our cache against the others', by error at equal shares of block calls saved.

Every method runs the same weights, prompts, noise and samplers, one prompt at a time. Thresholds are searched on a few
prompts and measured on all; a method with few possible settings is interpolated between the two next to a budget.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from pathlib import Path

from . import easycache, methods
from .chart import draw_chart
from .measurement import Bench, Measured, Task
from .results import as_json, tables
from .samplers import SAMPLERS, Schedule
from .subject import Subject, write_snapshot

_bench: Bench | None = None  # of a worker process


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=16, help="how many held-out prompts (default 16)")
    parser.add_argument("--steps", type=int, nargs="+", default=(28, 50), metavar="N")
    parser.add_argument("--samplers", nargs="+", default=("euler", "dpmpp_2m"), choices=SAMPLERS)
    parser.add_argument("--methods", nargs="+", metavar="TEXT", help="only those whose name contains one of these")
    parser.add_argument("--model", help="a safetensors file in FLUX's or diffusers' layout, or random:SEED")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4), help="processes (default: one a core)")
    parser.add_argument("--out", type=Path, default=Path("out"))
    args = parser.parse_args()
    try:
        run(args)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> dict:
    """Measure, print the tables, write the JSON file and the chart, and return what the file holds."""
    for name in ("prompts", "jobs"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; allowed are whole numbers from 1.")
    schedules = [Schedule(sampler, steps) for steps in args.steps for sampler in args.samplers]
    with tempfile.TemporaryDirectory(prefix="para-fbcache-") as folder:
        file = Path(folder) / "model.safetensors"
        model = write_snapshot(args.model, file)
        setup = (file, args.prompts, not model.startswith("random:"))
        subject = Subject(*setup[:2], trained=setup[2])
        chosen, left_out = choose(subject, args.methods or [""])
        tasks = [Task(schedule, None, ()) for schedule in schedules]
        tasks += [Task(schedule, method, methods.BUDGETS) for method in chosen for schedule in schedules]
        done: dict[int, Measured] = {}

        def result() -> dict:
            return as_json(model, args.prompts, [done[number] for number in sorted(done)], left_out)

        with workers(args.jobs, setup) as pool:
            for part in (range(len(schedules)), range(len(schedules), len(tasks))):  # all baselines first
                for number, measured in measure(pool, tasks, part, left_out):
                    done[number] = measured
                    write(args.out, result())  # after each: a run that is ended early leaves what it had
    final = result()
    write(args.out, final)
    sys.stdout.write(f"{tables(final)}\nwrote fbcache_benchmark.json and fbcache_benchmark.png to {args.out}\n")
    return final


def write(out: Path, result: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "fbcache_benchmark.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
    draw_chart(result).save(out / "fbcache_benchmark.png")


def choose(subject: Subject, wanted: Sequence[str]) -> tuple[list[methods.Method], dict[str, str]]:
    """The methods that can run here, and why others cannot."""
    found = [*methods.all_methods(), easycache.EasyCache()]
    found = [method for method in found if any(text.lower() in method.name.lower() for text in wanted)]
    if not found:
        raise ValueError(f"no method's name contains {' or '.join(wanted)}")
    why = {
        method.name: easycache.missing(subject) if isinstance(method, easycache.EasyCache) else methods.missing(method)
        for method in found
    }
    left_out = {name: reason for name, reason in why.items() if reason}
    for name, reason in left_out.items():
        sys.stderr.write(f"left out: {name}: {reason}\n")
    return [method for method in found if method.name not in left_out], left_out


def workers(count: int, setup: tuple[Path, int, bool]) -> Executor:
    # spawn: a fork of a process that has used torch's threads hangs
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), start_worker, setup)


def start_worker(file: Path, num_prompts: int, trained: bool) -> None:
    global _bench
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    _bench = Bench(Subject(file, num_prompts, trained=trained), file.parent)


def work(task: Task) -> Measured:
    return _bench.measure(task)


def measure(
    pool: Executor, tasks: Sequence[Task], part: Sequence[int], left_out: dict[str, str]
) -> Iterator[tuple[int, Measured]]:
    """Carry out the tasks numbered `part`, with a line of progress for each; a method that fails is left out."""
    futures = {pool.submit(work, tasks[number]): number for number in part}
    for future in as_completed(futures):
        number = futures[future]
        task, error = tasks[number], future.exception()
        if task.method is None or error is None:
            line = progress(future.result())
            yield number, future.result()
        else:
            # Whatever a library raises on this machine or these weights: the others are still worth measuring.
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            left_out[f"{task.method.name} ({task.schedule})"] = line
        name = task.method.name if task.method else "no cache"
        sys.stderr.write(f"[{number + 1}/{len(tasks)}] {name}, {task.schedule}: {line}\n")


def progress(result: Measured) -> str:
    errors = [
        f"{budget:.0%} {found.figures.rel_l2:.1e}" if found.figures else f"{budget:.0%} -"
        for budget, found in result.at.items()
    ]
    return ", ".join([*errors, f"{result.seconds:.0f} s"])


if __name__ == "__main__":
    main()
