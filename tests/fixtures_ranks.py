"""The groups of gloo processes that all tests of a session share; see gloo_ranks.py."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gloo_ranks import GlooRanks


@pytest.fixture(scope="session")
def gloo_ranks() -> Iterator[Callable[..., GlooRanks]]:
    """(world_size, *, comfyui=None) -> the session's group of that size; processes start with its first case."""
    if sys.platform == "win32":
        pytest.skip("the groups of the tests need POSIX processes")
    groups: dict[tuple[int, Path | None], GlooRanks] = {}

    def group(world_size: int, *, comfyui: Path | None = None) -> GlooRanks:
        return groups.setdefault((world_size, comfyui), GlooRanks(world_size, comfyui))

    yield group
    for found in groups.values():
        found.close()


@pytest.fixture(scope="session")
def groups(comfy):
    """The processes that the launcher's tests share, two ranks on the CPU; started by the first that samples."""
    from para_core.adapters.comfy_groups import Groups

    groups = Groups()
    yield groups
    groups.close()


@pytest.fixture
def on_two_ranks(groups):
    """(model, *, listener=None, **settings) -> a MODEL that samples on those processes."""
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.parallel_config import ParallelConfig

    def spread(model, *, listener=None, **settings):
        return apply_parallel(model, ParallelConfig(("cpu", "cpu"), **settings), groups.session, listener=listener)

    return spread
