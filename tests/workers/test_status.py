"""After which failures ranks can be asked again. What CUDA and the ranks' connections raise is played by its texts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from para_core.workers.status import Status, is_harmless, usable

ILLEGAL = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported"
MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 23.64 GiB"


def raised(error: BaseException, *, behind: BaseException | None = None, hidden: bool = False) -> BaseException:
    """As it arrives where a call ends: while `behind` was handled, or after that without its mention."""
    try:
        if behind is None:
            raise error
        try:
            raise behind
        except type(behind):
            if hidden:
                raise error from None
            raise error  # noqa: B904
    except type(error) as caught:
        return caught


@pytest.mark.parametrize(
    "error",
    [
        raised(ValueError("ulysses_degree 3 does not divide 4 heads")),
        raised(NotImplementedError("no kernel for float8")),
        raised(torch.OutOfMemoryError(MEMORY)),
        raised(torch.OutOfMemoryError(MEMORY), behind=torch.OutOfMemoryError(MEMORY)),
        raised(ValueError("no such name"), behind=KeyError("name")),
    ],
    ids=repr,
)
def test_errors_that_leave_the_device_as_it_was(error):
    assert is_harmless(error, "cuda") and is_harmless(error, "cpu")


@pytest.mark.parametrize(
    "error",
    [
        raised(torch.AcceleratorError(ILLEGAL)),
        raised(RuntimeError(ILLEGAL)),
        raised(RuntimeError("CUDA error: device-side assert triggered")),
        raised(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm")),
        raised(RuntimeError("cuDNN error: CUDNN_STATUS_MAPPING_ERROR")),
        raised(RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:1, unhandled cuda error")),
        raised(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")),  # its type may hide one
        raised(ValueError(f"sampling failed: {ILLEGAL}")),
        raised(ValueError("sampling failed"), behind=torch.AcceleratorError(ILLEGAL)),
        raised(ValueError("sampling failed"), behind=RuntimeError(ILLEGAL), hidden=True),
        raised(torch.OutOfMemoryError(MEMORY), behind=torch.AcceleratorError(ILLEGAL)),
        raised(KeyboardInterrupt()),
    ],
    ids=repr,
)
def test_errors_after_which_the_device_may_be_lost(error):
    assert not is_harmless(error, "cuda")


TIMEOUT = "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 600000ms for recv"
CLOSED = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4071"


@pytest.mark.parametrize(
    "error",
    [
        raised(RuntimeError(TIMEOUT)),
        raised(RuntimeError(CLOSED)),
        raised(RuntimeError("Application timeout caused pair closure")),
        raised(RuntimeError("Gloo connectFullMesh failed with [...] Connect timeout")),
        raised(dist.DistBackendError("NCCL communicator was aborted on rank 1")),
        raised(dist.DistNetworkError("failed to recv, got 0 bytes")),
        raised(dist.DistStoreError("wait timeout after 600000ms, keys: /5//0")),
        raised(ValueError("sampling failed"), behind=RuntimeError(CLOSED)),
        raised(ValueError("sampling failed"), behind=RuntimeError(TIMEOUT), hidden=True),
    ],
    ids=repr,
)
def test_errors_after_which_the_ranks_connections_may_be_broken(error):
    assert not is_harmless(error, "cpu") and not is_harmless(error, "cuda")


def test_cpu_is_as_before_after_other_errors():
    assert is_harmless(raised(RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")), "cpu")
    assert is_harmless(raised(MemoryError()), "cpu")


def failed(rank: int, *, harmless: bool = True, count: int = 5) -> Status:
    return Status(rank, "Traceback ...", harmless, sequences={"0": count})


def went_well(rank: int) -> Status:
    return Status(rank, sequences={"0": 5})


@pytest.mark.parametrize(
    ("statuses", "on_cuda", "on_cpu"),
    [
        ([failed(0), failed(1)], True, True),
        ([failed(0), failed(1, harmless=False)], False, False),
        ([failed(0, harmless=False), failed(1, harmless=False)], False, False),
        ([went_well(0), failed(1, harmless=False)], False, False),
        ([went_well(0), failed(1)], False, True),
        ([failed(0), failed(1, count=6)], False, False),
    ],
    ids=["all harmless", "one harmful", "all harmful", "one harmful, one went well", "one went well", "out of step"],
)
def test_ranks_that_can_be_asked_again(statuses, on_cuda, on_cpu):
    assert usable(statuses, "cuda") == on_cuda
    assert usable(statuses, "cpu") == on_cpu
