"""The control store of the ranks of one machine: only who knows the group's key gets in, and nobody needs a port."""

import secrets
import stat
import sys
import threading
import time
from datetime import timedelta

import pytest

from para_core.workers.channel import ConnectionLost
from para_core.workers.private_store import PrivateRoot

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a group of ranks needs Linux")

KEY = secrets.token_bytes(32)


@pytest.fixture
def roots(tmp_path):
    return [PrivateRoot(tmp_path, "0", rank, 2, KEY, timedelta(seconds=20)) for rank in range(2)]


def test_both_ends_see_the_same_values(roots):
    held, line = (root.control() for root in roots)
    held.set("a", "1")
    line.set("b", "zwei")
    assert (line.get("a"), held.get("b")) == ("1", "zwei")
    for store in (line, held):
        store.set_first("c", str(id(store)))
    assert held.get("c") == line.get("c") == str(id(line))
    held.delete("c")
    assert not held.check("c") and held.check("a")


@pytest.mark.parametrize("waiting", [0, 1])
def test_get_waits_until_the_value_is_there(roots, waiting):
    stores, found = [root.control() for root in roots], []
    thread = threading.Thread(target=lambda: found.append(stores[waiting].get("late")), daemon=True)
    thread.start()
    time.sleep(0.2)
    assert not found
    stores[1 - waiting].set("late", "now")
    thread.join(5)
    assert found == ["now"]


def test_a_connection_for_each_thread(roots):
    """One waits while the other one asks."""
    first, second = roots[1].control(), roots[1].control()
    threading.Thread(target=first.get, args=("never",), daemon=True).start()
    second.set("other", "1")
    assert second.get("other") == "1"


def test_who_does_not_know_the_key_gets_nothing(tmp_path, roots):
    stranger = PrivateRoot(tmp_path, "0", 1, 2, bytes(32), timedelta(seconds=0.3))
    with pytest.raises(TimeoutError, match="rank 0 holds no store"):
        stranger.control()
    assert stat.S_IMODE((tmp_path / "root0.sock").stat().st_mode) == 0o600
    roots[1].control().set("still", "there")


def test_another_start_is_another_store(tmp_path, roots):
    """Ranks that are started again do not meet what a killed rank 0 left."""
    with pytest.raises(TimeoutError):
        PrivateRoot(tmp_path, "1", 1, 2, KEY, timedelta(seconds=0.3)).control()


def test_a_lost_rank_0_is_an_error_and_no_hang(roots):
    held, line = roots[0].control(), roots[1].control()
    line._connection.line.shutdown(2)
    with pytest.raises(ConnectionLost):
        line.get("a")
    assert roots[1].control().set("a", "b") is None and held.get("a") == "b"
