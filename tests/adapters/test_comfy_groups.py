"""Groups of processes live side by side on devices of their own, and make way for those that need one of theirs."""

import pytest

pytestmark = pytest.mark.usefixtures("comfy")


class Started:
    """A group whose ranks nobody needs."""

    connected = False

    def __init__(self, config):
        self.config, self.alive, self.recover = config, True, None

    def close(self):
        self.alive = False

    def state(self):
        return {"ranks": list(self.config.devices)}


@pytest.fixture
def groups(monkeypatch):
    from para_core.adapters import comfy_groups
    from para_core.workers import GroupConfig

    monkeypatch.setattr(comfy_groups.WorkerGroup, "start", lambda config, **_: Started(config))
    outside = GroupConfig(("cuda:0", "cuda:1"), "unused:Service")
    monkeypatch.setattr(comfy_groups, "attach", lambda address, **_: Started(outside))
    return comfy_groups.Groups()


def session(groups, *devices, attach_to=""):
    from para_core.parallel_config import ParallelConfig

    return groups.session(ParallelConfig(devices, attach_to=attach_to))


def ranks(groups):
    return [tuple(state["ranks"]) for state in groups.state()]


def test_groups_on_devices_of_their_own_stay(groups):
    first, second = session(groups, "cuda:0", "cuda:1"), session(groups, "cuda:2", "cuda:3")
    for _ in range(2):
        assert session(groups, "cuda:0", "cuda:1") is first and first.group.alive
        assert session(groups, "cuda:2", "cuda:3") is second and second.group.alive
    assert (first.replaced, second.replaced) == ((), ())
    assert sorted(ranks(groups)) == [("cuda:0", "cuda:1"), ("cuda:2", "cuda:3")]
    groups.close()
    assert not first.group.alive and not second.group.alive and ranks(groups) == []


@pytest.mark.parametrize("devices", [("cuda:0", "cuda:1", "cuda:2"), ("cuda:1", "cuda:0"), ("cuda:1", "cuda:3")])
def test_a_group_makes_way_for_one_that_needs_a_device_of_it(groups, devices):
    first, other = session(groups, "cuda:0", "cuda:1"), session(groups, "cuda:4", "cuda:5")
    second = session(groups, *devices)
    assert not first.group.alive and other.group.alive
    assert second.replaced == ("cuda:0", "cuda:1")
    assert session(groups, *devices) is second and second.replaced == (), "said by the run in which it happened"


def test_groups_on_the_cpu_share_it(groups):
    first, second = session(groups, "cpu", "cpu"), session(groups, "cpu", "cpu", "cpu")
    assert not first.group.alive and second.replaced == ("cpu", "cpu")


def test_a_group_that_is_lost_is_started_again_and_not_called_replaced(groups):
    first = session(groups, "cuda:0", "cuda:1")
    first.group.close()
    assert groups.running() is None
    second = session(groups, "cuda:0", "cuda:1")
    assert second is not first and second.group.alive and second.replaced == ()
    second.group.close()
    assert session(groups, "cuda:1", "cuda:2").replaced == (), "nothing of it ran any more"


def test_a_group_that_the_user_started_stays_beside_all_others(groups):
    first, attached = session(groups, "cuda:0", "cuda:1"), session(groups, attach_to="/group.sock")
    second = session(groups, "cuda:1", "cuda:2")
    assert attached.group.alive and attached.replaced == ()
    assert not first.group.alive and second.replaced == ("cuda:0", "cuda:1")


def test_the_running_group_is_the_one_that_was_used_last(groups):
    assert groups.running() is None
    session(groups, "cuda:0", "cuda:1")
    second = session(groups, "cuda:2", "cuda:3")
    session(groups, "cuda:0", "cuda:1")
    assert groups.running().group == ("", ("cuda:0", "cuda:1"))
    session(groups, attach_to="/group.sock")
    assert groups.running().group == ("/group.sock", ())
    assert groups.session(groups.running()).world_size == 2
    second.group.close()
    groups.close()
    assert groups.running() is None


def test_the_notice_says_what_was_ended():
    from para_core.parallel_notice import ParallelNotice

    text = ParallelNotice("ranks", 2, "batch 1 x ring 1 x Ulysses 2", ("cuda:0", "cuda:1")).text()
    assert text == (
        "2 ranks: batch 1 x ring 1 x Ulysses 2. "
        "Ended the processes on cuda:0, cuda:1, which use some of the same devices."
    )
