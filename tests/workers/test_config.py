"""What a group refuses before a process is started."""

from __future__ import annotations

import pytest

from para_core.workers import GroupConfig
from para_core.workers.launch import LocalGroup


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": ()}, "cannot form a group"),
        ({"devices": ("cpu", "cuda:0")}, "cannot form a group"),
        ({"backend": "nccl"}, "backend='nccl' on cpu; use 'auto', which is nccl with CUDA"),
        ({"backend": "gloo", "devices": ("cuda:0", "cuda:1")}, "backend='gloo' on cuda; use 'auto'"),
        ({"backend": "mpi"}, "backend='mpi'"),
        ({"service": "no path"}, "package.module:Factory"),
        ({"num_threads": 0}, "at least one thread"),
        ({"heartbeat_timeout": 0.0}, "heartbeat_timeout=0.0; times are seconds above 0"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        GroupConfig(**({"devices": ("cpu", "cpu"), "service": "a.b:C"} | changes))


def test_one_cuda_device_is_no_two_ranks():
    with pytest.raises(ValueError, match="names a device twice"):
        LocalGroup(GroupConfig(("cuda:0", "cuda:0"), "a.b:C"))


def test_cuda_tensors_go_by_nccl():
    assert GroupConfig(("cuda:0", "cuda:1"), "a.b:C").process_group_backend == "cpu:gloo,cuda:nccl"
    assert GroupConfig(("cpu",), "a.b:C").process_group_backend == "gloo"
