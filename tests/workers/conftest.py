"""A group of two ranks that the tests of this folder share, and what ends other groups."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from para_core.workers import GroupConfig, WorkerGroup

TESTS = Path(__file__).absolute().parent.parent


@pytest.fixture(scope="session")
def group_config() -> Callable[..., GroupConfig]:
    if sys.platform != "linux":
        pytest.skip("a group of ranks needs Linux")

    def config(**changes: object) -> GroupConfig:
        given = {"devices": ("cpu", "cpu"), "service": "workers.services:Session", "sys_path": (str(TESTS),)}
        return GroupConfig(**(given | changes))

    return config


@pytest.fixture
def start(group_config) -> Iterator[Callable[..., WorkerGroup]]:
    """start(**changes of the config) -> a group of the test's own."""
    groups = []

    def started(**changes: object) -> WorkerGroup:
        groups.append(WorkerGroup.start(group_config(**changes)))
        return groups[-1]

    yield started
    for group in groups:
        group.close()


@pytest.fixture(scope="session")
def group(group_config) -> Iterator[WorkerGroup]:
    """Shared: a test may lose its ranks, for they come back, but not change its config."""
    group = WorkerGroup.start(group_config(failure_grace=1.0))
    yield group
    group.close()
