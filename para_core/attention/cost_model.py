"""Expected time of one model call on a mesh: arithmetic, all-to-all and ring bytes. python -m prints the table.

An estimate to choose a mesh by, from rates that are assumptions and stand beside the result; not a measurement.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass

from .mesh import MeshShape


@dataclass(frozen=True)
class Workload:
    """One call of a model. linear_weights: that every token meets, of all layers together; rows: of the batch."""

    name: str
    num_tokens: int
    num_layers: int
    num_heads: int
    width: int
    linear_weights: float
    rows: int = 1
    bytes_per_value: int = 2

    @property
    def linear_flop(self) -> float:
        return 2 * self.linear_weights * self.num_tokens

    @property
    def attention_flop(self) -> float:
        return 4 * self.num_tokens**2 * self.width * self.num_layers


@dataclass(frozen=True)
class Machine:
    """Achieved rates of one device, in FLOP per second, and of its link, in bytes per second each way.

    latency: seconds of a message or collective. overlaps: whether a transfer leaves the arithmetic at full speed; then
    Ulysses without a ring sends its heads in two portions, where they divide.
    """

    name: str
    linear: float
    attention: float
    bandwidth: float
    latency: float
    overlaps: bool = True


@dataclass(frozen=True)
class Cost:
    """Seconds of one call on the slowest rank. exchange, ring: of the transfers, what does not hide behind compute."""

    compute: float
    exchange: float
    ring: float

    @property
    def total(self) -> float:
        return self.compute + self.exchange + self.ring


def exchanged_bytes(workload: Workload, shape: MeshShape) -> float:
    """That a rank sends in the all-to-alls of one layer: q, k, v and the output, but for its own part."""
    sent = (shape.ulysses - 1) / shape.ulysses
    return 4 * workload.width * workload.bytes_per_value * workload.num_tokens / (shape.ring * shape.ulysses) * sent


def block_bytes(workload: Workload, shape: MeshShape) -> float:
    """Of the keys and values that go to the next rank of the ring, ring - 1 times a layer."""
    return 2 * workload.width * workload.bytes_per_value * workload.num_tokens / (shape.ring * shape.ulysses)


def cost(workload: Workload, machine: Machine, shape: MeshShape) -> Cost:
    """With S tokens, L layers, width h, e bytes a value, u x r ranks (Ulysses x ring), B bytes and F FLOP a second:

    compute:  (2 W S / F_linear + 4 S^2 h L / F_attention) / (u r)
    exchange: L (X + 2 latency) with X = 4 h e S / (u r) (u - 1) / u / B, three quarters of it before attention A and
              one behind; in two portions L (X / 2 + 2 latency + max(0, 3/8 X + latency - A / 2) +
              max(0, X / 8 + latency - A / 2)): the second portion travels beside the first one's attention
    ring:     L (r - 1) max(0, 2 h e S / (u r) / B + latency - attention to a block, 4 S^2 h / (u r^2) / F_attention),
              without the subtraction where transfers do not overlap
    all times the rows that remain on a rank of the batch axis.
    """
    size, rows = shape.ring * shape.ulysses, workload.rows / shape.batch
    attention = workload.attention_flop / machine.attention / size
    exchange = ring = 0.0
    if shape.ulysses > 1:
        portions = machine.overlaps and shape.ring == 1 and workload.num_heads % (2 * shape.ulysses) == 0
        half = attention / workload.num_layers / 2 if portions else None
        exchange = workload.num_layers * _exchange_of_layer(workload, machine, shape, half)
    if shape.ring > 1:
        transfer = block_bytes(workload, shape) / machine.bandwidth + machine.latency
        hidden = attention / workload.num_layers / shape.ring if machine.overlaps else 0.0
        ring = workload.num_layers * (shape.ring - 1) * max(0.0, transfer - hidden)
    compute = workload.linear_flop / machine.linear / size + attention
    return Cost(rows * compute, rows * exchange, rows * ring)


def _exchange_of_layer(workload: Workload, machine: Machine, shape: MeshShape, half: float | None) -> float:
    """half: seconds of attention to one of two portions of the heads; None: all heads at once."""
    transfer, latency = exchanged_bytes(workload, shape) / machine.bandwidth, machine.latency
    if half is None:
        return transfer + 2 * latency
    beside = max(0.0, transfer * 3 / 8 + latency - half) + max(0.0, transfer / 8 + latency - half)
    return transfer / 2 + 2 * latency + beside


# FLUX.1: 19 + 38 blocks of 12 h^2 weights a token; 1024 x 1024 pixels are 4,096 tokens, and 512 of text.
FLUX = Workload("FLUX.1, 1024 x 1024", 4096 + 512, 57, 24, 3072, 57 * 12 * 3072**2)
# Wan 14B: self-attention 4 h^2, cross-attention 2 h^2, MLP 2 h 13,824; 81 frames of 1280 x 720 are 21 x 45 x 80.
# Two rows: the classifier-free guidance that this model is used with.
WAN = Workload("Wan 14B, 720p, 81 frames", 21 * 45 * 80, 40, 40, 5120, 40 * (6 * 5120**2 + 2 * 5120 * 13824), rows=2)
MACHINES = (
    # Rates of bf16 as such cards reach in practice, about two thirds of the data sheet; without peer-to-peer access
    # both directions cross host memory.
    Machine("RTX 4090, PCIe 4 x16 through host memory", 110e12, 110e12, 12e9, 40e-6),
    Machine("A100 PCIe, PCIe 4 x16 peer to peer", 210e12, 170e12, 22e9, 25e-6),
    Machine("H100 SXM, NVLink 4", 600e12, 480e12, 350e9, 15e-6),
)
SIZES = (2, 4, 8)
COLUMNS = ("Ulysses", "ring", "ring 2 x Ulysses", "rows apart x Ulysses", "rows apart x ring")


def shapes(workload: Workload, size: int) -> tuple[MeshShape | None, ...]:
    """The mesh of each column; None where the column has none of its own."""
    rest = size // workload.rows
    return (
        MeshShape(ulysses=size),
        MeshShape(ring=size),
        MeshShape(ring=2, ulysses=size // 2) if size > 2 else None,
        MeshShape(workload.rows, ulysses=rest) if workload.rows > 1 else None,
        MeshShape(workload.rows, ring=rest) if workload.rows > 1 and rest > 1 else None,
    )


def table() -> Iterator[str]:
    """Markdown: seconds of a step, and in brackets the speedup over one device."""
    for machine in MACHINES:
        yield (
            f"**{machine.name}**: {machine.linear / 1e12:.0f} TFLOPS in linear layers, {machine.attention / 1e12:.0f} "
            f"in attention; {machine.bandwidth / 1e9:.0f} GB/s each way, {machine.latency * 1e6:.0f} us a message.\n"
        )
        yield f"| model | devices | {' | '.join(COLUMNS)} |"
        yield "|---" * (2 + len(COLUMNS)) + "|"
        for workload in (FLUX, WAN):
            one = cost(workload, machine, MeshShape()).total
            for size in SIZES:
                cells = [_cell(workload, machine, shape, one) for shape in shapes(workload, size)]
                yield f"| {workload.name} (1 device: {one:.3g} s) | {size} | {' | '.join(cells)} |"
        yield ""


def _cell(workload: Workload, machine: Machine, shape: MeshShape | None, one: float) -> str:
    if shape is None:
        return "-"
    total = cost(workload, machine, shape).total
    return f"{total:.3g} s ({one / total:.2f} x)"


if __name__ == "__main__":
    sys.stdout.write("\n".join(table()) + "\n")
