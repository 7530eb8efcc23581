"""python -m tests.benchmarks.attention_model: the cost model's prediction beside the time of a FLUX-shaped block.

The model gets this machine's rates, measured by themselves: linear layers, attention, and bytes between processes.
Everything by CPU seconds of the slowest rank; on a CPU a transfer takes the time of the core that should compute.
"""

from __future__ import annotations

import argparse
import sys

from para_core.attention import MeshShape
from para_core.attention.cost_model import Machine, Workload, cost

from .attention import Bench
from .attention_stack import HEADS, WIDTH

MESSAGE = 16 * 2**20  # bytes, the size of a block of keys and values


def workload(num_tokens: int) -> Workload:
    return Workload("a block", num_tokens, 1, HEADS, WIDTH, linear_weights=12 * WIDTH**2, bytes_per_value=4)


def measured_machine(bench: Bench, world_size: int, num_tokens: int) -> Machine:
    """The rates of the slowest rank."""
    case = "benchmarks.attention_stack.rates"
    results = bench.group(world_size).run(case, timeout=3600, num_tokens=num_tokens, message=MESSAGE)
    seconds = {name: max(result[name] for result in results) for name in results[0]}
    flop = workload(num_tokens)
    return Machine(
        "this machine",
        linear=flop.linear_flop / seconds["linear"],
        attention=flop.attention_flop / seconds["attention"],
        bandwidth=(world_size - 1) * MESSAGE / max(1e-9, seconds["message"] - seconds["empty message"]),
        latency=seconds["empty message"],
        overlaps=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024 + 64, 2048 + 256])
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    bench = Bench(num_blocks=1)
    try:
        for num_tokens in args.tokens:
            compare(bench, args.ranks, num_tokens)
    finally:
        bench.close()


def compare(bench: Bench, world_size: int, num_tokens: int) -> None:
    machine = measured_machine(bench, world_size, num_tokens)
    sys.stdout.write(
        f"{num_tokens} tokens, {world_size} ranks: {machine.linear / 1e9:.0f} GFLOPS in linear layers, "
        f"{machine.attention / 1e9:.0f} in attention, {machine.bandwidth / 1e9:.2f} GB/s, "
        f"{machine.latency * 1e6:.0f} us a message\n"
    )
    for name, shape in (("ring", MeshShape(ring=world_size)), ("ulysses", MeshShape(ulysses=world_size))):
        measured = min(cpu for cpu, _ in bench.seconds(world_size, (name,), num_tokens, 3)[name])
        predicted = cost(workload(num_tokens), machine, shape).total
        sys.stdout.write(f"  {name}: predicted {predicted:.3f} s, measured {measured:.3f} s\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
