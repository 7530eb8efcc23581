"""Ports that gloo leaves open take no connections once the ranks are connected."""

import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a group of ranks needs Linux")


@pytest.mark.parametrize("deaf", [True, False])
def test_port_of_a_group_takes_no_connections_once_it_is_made(gloo_ranks, deaf):
    """The other way round, it is what gloo does by itself: should that change, ports.py can go."""
    for taken, total in gloo_ranks(2).run("workers.port_cases.group_made", deaf=deaf):
        assert taken == [not deaf] and total == 3


def test_groups_of_a_mesh_that_the_service_makes_take_none(gloo_ranks):
    for taken, total in gloo_ranks(2).run("workers.port_cases.mesh_of_the_service", timeout=180):
        assert taken and not any(taken) and total == 3
