"""The estimate on paper: its arithmetic, and its bytes beside those that really cross the wire."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from attention.cases import Problem

from para_core.attention import MeshShape
from para_core.attention.cost_model import (
    FLUX,
    MACHINES,
    WAN,
    Machine,
    Workload,
    block_bytes,
    cost,
    exchanged_bytes,
    table,
)

# 1 FLOP and 1 byte a second: seconds are FLOP and bytes.
UNIT = Machine("unit", 1, 1, 1, 0, overlaps=False)
TINY = Workload("tiny", num_tokens=100, num_layers=3, num_heads=4, width=8, linear_weights=50, bytes_per_value=4)


@pytest.mark.parametrize("shape", [(1, 1, 4), (1, 4, 1), (1, 2, 2)], ids=["ulysses", "ring", "usp"])
def test_bytes_are_those_that_ranks_send(gloo_ranks, shape):
    problem = Problem(shape, (25, 25, 25, 25), heads=4, dim=16, rows=1)
    workload = Workload(
        "one layer", num_tokens=100, num_layers=1, num_heads=4, width=64, linear_weights=0, bytes_per_value=4
    )
    expected = exchanged_bytes(workload, MeshShape(*shape)), (shape[1] - 1) * block_bytes(workload, MeshShape(*shape))
    assert gloo_ranks(4).run("attention.counts.sent_bytes", problem=problem) == [expected] * 4


def test_one_rank_only_computes():
    found = cost(TINY, UNIT, MeshShape())
    assert found.compute == 2 * 50 * 100 + 4 * 100**2 * 8 * 3
    assert found.total == found.compute


def test_ranks_divide_the_work_and_add_their_messages():
    one, slow = cost(TINY, UNIT, MeshShape()), dataclasses.replace(UNIT, latency=7)
    ulysses, ring = cost(TINY, slow, MeshShape(ulysses=2)), cost(TINY, slow, MeshShape(ring=2))
    assert ulysses.compute == ring.compute == one.compute / 2
    assert ulysses.exchange == 3 * (4 * 8 * 4 * 50 / 2 + 2 * 7) and ulysses.ring == 0
    assert ring.ring == 3 * (2 * 8 * 4 * 50 + 7) and ring.exchange == 0


def test_ring_waits_only_for_what_attention_does_not_cover():
    slow = Machine("slow link", 1, 1, 1 / 40, 0)
    block = 4 * 50 * 50 * 8
    assert cost(TINY, slow, MeshShape(ring=2)).ring == 3 * (40 * 2 * 8 * 4 * 50 - block)
    assert cost(TINY, dataclasses.replace(slow, bandwidth=1), MeshShape(ring=2)).ring == 0


def test_half_of_the_exchange_hides_behind_attention():
    def exchange(bandwidth: float, *, overlaps: bool, ring: int = 1, num_heads: int = 4) -> float:
        workload = dataclasses.replace(TINY, num_heads=num_heads)
        return cost(workload, Machine("link", 1, 1, bandwidth, 5, overlaps), MeshShape(1, ring, 2)).exchange

    sent, half = 4 * 8 * 4 * 50 / 2, 4 * 100**2 * 8 / 2 / 2
    assert exchange(1, overlaps=False) == 3 * (sent + 10)
    assert exchange(1, overlaps=True) == 3 * (sent / 2 + 10)
    slow = 1 / 200
    assert exchange(slow, overlaps=True) == 3 * (100 * sent + 10 + 75 * sent + 5 - half + 25 * sent + 5 - half)
    for impossible in ({"ring": 2}, {"num_heads": 6}):
        assert exchange(1, overlaps=True, **impossible) == exchange(1, overlaps=False, **impossible)


def test_rows_apart_cost_nothing():
    rows = dataclasses.replace(TINY, rows=2)
    assert cost(rows, UNIT, MeshShape(batch=2)).total == cost(TINY, UNIT, MeshShape()).total
    assert cost(rows, UNIT, MeshShape(2, 1, 2)).total == cost(TINY, UNIT, MeshShape(1, 1, 2)).total


def test_models_have_their_published_sizes():
    assert FLUX.linear_flop + FLUX.attention_flop == pytest.approx(74.4e12, rel=0.01)
    assert WAN.num_tokens == 75600 and WAN.linear_weights == pytest.approx(11.95e9, rel=0.01)  # 14e9 with the rest


def test_table_has_every_machine_and_size():
    lines = list(table())
    assert sum(line.startswith("| FLUX.1") for line in lines) == 3 * len(MACHINES)
    assert all(any(line.startswith(f"**{machine.name}**") for line in lines) for machine in MACHINES)


def numbers(row: str) -> list[list[str]]:
    """Cell by cell."""
    return [re.findall(r"\d+\.?\d*", cell) for cell in row.split("|")]


@pytest.mark.parametrize("page", ["performance.md", "performance/zh.md"])
def test_page_shows_the_tables_as_they_are_printed(page):
    """Row by row and in order; the Chinese page translates words only, and heads of tables."""
    text = Path(__file__).parents[2].joinpath("web", "docs", page).read_text(encoding="utf-8")
    models = tuple(f"| {workload.name.rpartition(', ')[0]}" for workload in (FLUX, WAN))
    shown = [line for line in text.splitlines() if line.startswith(("**", *models))]
    printed = [line for line in table() if line.startswith(("**", *models))]
    assert len(printed) == len(MACHINES) * 7
    if page == "performance.md":
        assert "\n".join(table()).strip() in text
    assert [(row[:8], numbers(row)) for row in shown] == [(row[:8], numbers(row)) for row in printed]
