"""python -m tests.benchmarks.attention: a FLUX-shaped stack on one rank and on several one-thread ranks.

Speedups are of one rank's time: by CPU seconds of the slowest rank, and by wall seconds. The ceiling is what the
machine itself gives in the same round: as many ranks as that, each with all the work, beside one rank that is alone.
With --blocks 0 only the attention, without linear layers around it: it shows small differences.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# gloo_ranks and its cases lie in tests/, which pytest puts on the path.
sys.path.insert(0, str(Path(__file__).absolute().parent.parent))

from gloo_ranks import GlooRanks  # noqa: E402

OURS = ("ring", "ulysses")
PEERS = ("diffusers ulysses", "yunchang ulysses", "yunchang ring")
ACCEPTED = 1e-6  # relative error of float32 attention
WARM_UP_TOKENS = 64
TIMEOUT = 3600.0  # seconds; a loaded machine is slow


@dataclass(frozen=True)
class Speedups:
    """Of several rounds: one rank's time over the slowest rank's, by CPU and wall seconds; the ceilings likewise."""

    name: str
    cpu: tuple[float, ...]
    wall: tuple[float, ...]
    ceiling_cpu: tuple[float, ...]
    ceiling_wall: tuple[float, ...]

    def line(self) -> str:
        columns = (self.cpu, self.wall, self.ceiling_cpu, self.ceiling_wall)
        return f"{self.name:20}" + "".join(f"{_range(column):24}" for column in columns).rstrip()


class Bench:
    """The groups of ranks, which stay up for all measurements."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._groups: dict[int, GlooRanks] = {}

    def group(self, world_size: int) -> GlooRanks:
        return self._groups.setdefault(world_size, GlooRanks(world_size))

    def close(self) -> None:
        for group in self._groups.values():
            group.close()

    def seconds(
        self, world_size: int, names: Sequence[str], num_tokens: int, num_rounds: int
    ) -> dict[str, list[tuple[float, float]]]:
        """CPU and wall seconds of the slowest rank in each round, all in turn in the same processes."""
        case = functools.partial(self.group(world_size).run, "benchmarks.attention_stack.in_turn", timeout=TIMEOUT)
        case = functools.partial(case, implementations=names, num_blocks=self.num_blocks)
        case(num_tokens=WARM_UP_TOKENS, num_rounds=1)
        results = case(num_tokens=num_tokens, num_rounds=num_rounds)
        return {
            name: [
                (max(cpu for cpu, _ in of_round), max(wall for _, wall in of_round))
                for of_round in zip(*(one[name] for one in results), strict=True)
            ]
            for name in names
        }

    def runs(self, world_size: int, implementation: str) -> str:
        """Empty where the implementation is there and right; else why not."""
        from gloo_ranks import RanksFailed

        try:
            errors = self.group(world_size).run("benchmarks.attention_stack.error", implementation=implementation)
        except RanksFailed as failure:
            return str(failure).strip().splitlines()[-1]
        return "" if max(errors) <= ACCEPTED else f"relative error {max(errors):.1e}"

    def compare(self, world_size: int, names: Sequence[str], num_tokens: int, num_rounds: int) -> list[Speedups]:
        """All implementations in turn within each round, so that each has the ceiling and the baseline beside it."""
        found = self.seconds(world_size, ("one", "alone", *names), num_tokens, num_rounds)
        ceilings = list(zip(*_ratios(found["one"], found["alone"], world_size), strict=True))
        return [Speedups(name, *zip(*_ratios(found["one"], found[name]), strict=True), *ceilings) for name in names]


def _ratios(
    ours: Sequence[tuple[float, float]], theirs: Sequence[tuple[float, float]], times: int = 1
) -> list[tuple[float, float]]:
    return [
        (times * cpu / their_cpu, times * wall / their_wall)
        for (cpu, wall), (their_cpu, their_wall) in zip(ours, theirs, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024 + 64, 4096 + 512])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--peers", action="store_true", help="diffusers and yunchang too, where they are installed")
    args = parser.parse_args()
    bench = Bench(args.blocks)
    try:
        for world_size in args.ranks:
            names = available(bench, world_size, (*OURS, *PEERS) if args.peers else OURS)
            for num_tokens in args.tokens:
                report(bench.compare(world_size, names, num_tokens, args.rounds), world_size, num_tokens)
    finally:
        bench.close()


def available(bench: Bench, world_size: int, names: Sequence[str]) -> list[str]:
    """Those that run and are right on this machine; the others are named with the reason."""
    reasons = {name: bench.runs(world_size, name) for name in names}
    for name, reason in reasons.items():
        if reason:
            sys.stdout.write(f"{name}: left out, {reason}\n")
    return [name for name, reason in reasons.items() if not reason]


def report(results: list[Speedups], world_size: int, num_tokens: int) -> None:
    sys.stdout.write(f"\n{num_tokens} tokens, {world_size} ranks over 1: speedup, median (lowest to highest)\n")
    columns = ("by CPU", "by wall", "ceiling CPU", "ceiling wall")
    sys.stdout.write(" " * 20 + "".join(f"{column:24}" for column in columns).rstrip() + "\n")
    for result in results:
        sys.stdout.write(result.line() + "\n")
    sys.stdout.flush()


def _range(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
