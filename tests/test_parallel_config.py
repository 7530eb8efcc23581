"""The devices that a user's request comes to, and what of it one device alone refuses."""

import pytest
import torch

from para_core.parallel_config import ParallelConfig, check_alone, chosen_devices

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture(autouse=True)
def four_devices(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)


@pytest.mark.parametrize(
    ("number", "names", "default", "expected"),
    [
        (0, "", GPU, ("cuda:0", "cuda:1", "cuda:2", "cuda:3")),
        (2, "", GPU, ("cuda:0", "cuda:1")),
        (1, "", GPU, ("cuda:0",)),
        (0, "", CPU, ("cpu",)),
        (2, "", CPU, ("cpu", "cpu")),
        (0, "3, 1", GPU, ("cuda:3", "cuda:1")),
        (2, "cuda:2 cuda", GPU, ("cuda:2", "cuda:0")),
        (0, "1,", GPU, ("cuda:1",)),
        (0, " cpu ", GPU, ("cpu",)),
        (3, "cpu", GPU, ("cpu", "cpu", "cpu")),
        (0, "cpu, cpu", CPU, ("cpu", "cpu")),
    ],
)
def test_devices_of_a_request(number, names, default, expected):
    assert chosen_devices(number, names, default) == expected


@pytest.mark.parametrize(
    ("number", "names", "default", "message"),
    [
        (5, "", GPU, "num_devices is 5, but this machine has 4; use 0 for all of them."),
        (3, "0, 1", GPU, "num_devices is 3, but devices names 2: 0, 1. Make them agree."),
        (1, "cpu, cpu", CPU, "num_devices is 1, but devices names 2: cpu, cpu. Make them agree."),
        (0, "0, 4", GPU, "device cuda:4 is not there; this machine has 4: 0 to 3."),
        (0, "cuda:0", CPU, "device cuda:0 is not there; this machine has none that ComfyUI uses; leave devices empty,"),
        (0, "1, cuda:1", GPU, "device cuda:1 is named 2 times; name each once."),
        (0, "0, gpu", GPU, '"gpu" is not a device; name them like 0, 1 or cuda:0, cuda:1, or leave this empty.'),
        (0, "0", CPU, '"0" is not a device'),
    ],
)
def test_devices_that_are_refused(number, names, default, message):
    with pytest.raises(ValueError) as refused:
        chosen_devices(number, names, default)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("chosen", "names", "there"),
    [("cuda:0", "", GPU), ("cuda:0", "0", torch.device("cuda")), ("cuda:0", "", torch.device("cuda", 1))]
    + [("cuda:1", "1", torch.device("cuda", 1)), ("cpu", "cpu", CPU)],
)
def test_one_device_that_is_the_hosts_own(chosen, names, there):
    check_alone(ParallelConfig((chosen,), ring_degree=1), names, there)


@pytest.mark.parametrize(
    ("chosen", "names", "settings", "message"),
    [
        (
            "cuda:1",
            "1",
            {},
            'devices is "1", but one device gets no processes of its own, and ComfyUI computes on cuda:0',
        ),
        ("cpu", "cpu", {}, 'devices is "cpu", but one device gets no processes'),
        ("cuda:0", "", {"ring_degree": 4}, "ring_degree is 4, but there is one device; use 0, or name at least two"),
        (
            *("cuda:0", "0", {"ring_degree": 2, "ulysses_degree": 2}),
            "ring_degree is 2 and ulysses_degree is 2, but there is one device",
        ),
        ("cuda:0", "", {"batch_parallel": "on"}, "batch_parallel is on, but there is one device; use auto"),
    ],
)
def test_what_one_device_alone_would_leave_undone(chosen, names, settings, message):
    with pytest.raises(ValueError) as refused:
        check_alone(ParallelConfig((chosen,), **settings), names, GPU)
    assert str(refused.value).startswith(message)
