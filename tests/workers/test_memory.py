"""Weights are in memory once, however many ranks use them."""

from __future__ import annotations

import sys

import pytest

from tests.benchmarks.workers import MEBIBYTE, added_by_checkpoint, config


@pytest.mark.skipif(sys.platform != "linux", reason="reads PSS from /proc")
def test_checkpoint_of_three_ranks_costs_little_more_than_once(start):
    given = config(3)
    group = start(devices=given.devices, service=given.service)
    assert added_by_checkpoint(group, 256 * MEBIBYTE) <= 1.15
