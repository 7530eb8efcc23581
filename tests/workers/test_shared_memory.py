"""Memory without a name: mapped twice, grown, given back."""

from __future__ import annotations

import os
import sys

import pytest
import torch

from para_core.workers import shared_memory
from para_core.workers.shared_memory import (
    KEPT,
    MAX_LENT,
    WORTH_LENDING,
    Answers,
    GrowingBuffer,
    LentAnswers,
    ReceivedBuffer,
    SharedMemory,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a group of ranks needs Linux")


@pytest.fixture(params=["memfd", "file"])
def kind(request, monkeypatch):
    if request.param == "file":
        monkeypatch.delattr(os, "memfd_create", raising=False)
    elif not hasattr(os, "memfd_create"):
        pytest.skip("no memfd_create on this system")


def test_mappings_show_the_same_bytes_and_private_ones_keep_theirs(kind):
    memory = SharedMemory.create(1000)
    first, second, private = memory.mapped(), memory.mapped(), memory.mapped(private=True)
    memory.close()
    first.fill_(7)
    assert torch.equal(second, first) and torch.equal(private, first)
    private.fill_(8)
    assert int(first.sum()) == 7000


@pytest.mark.parametrize("pagemap", ["/proc/self/pagemap", "/nowhere"])
def test_what_one_message_wrote_into_is_as_the_peer_left_it_at_the_next(kind, monkeypatch, pagemap):
    monkeypatch.setattr(shared_memory.PrivateMapping, "PAGEMAP", pagemap)
    size, buffer, addresses = 1_000_000, ReceivedBuffer(), []
    memory = SharedMemory.create(size)
    theirs = memory.mapped()
    buffer.replace(memory)
    for number in range(4):
        theirs.fill_(number)
        message = buffer.message(size, private=True)
        assert int(message.sum()) == size * number
        if number != 2:
            message[number::4096] = 99
        assert int(theirs.sum()) == size * number, "writing reaches nobody else"
        addresses.append(message.data_ptr())
    buffer.close()
    assert int(message[-1]) == 3, "as long as its tensors, the memory lives"
    if pagemap == "/proc/self/pagemap":
        assert len(set(addresses)) == 1


def test_nothing_has_a_name(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(shared_memory.tempfile, "tempdir", str(tmp_path))
    memory = SharedMemory.create(10)
    assert not list(tmp_path.iterdir())
    memory.close()


def test_buffer_is_used_again_until_it_is_too_small():
    buffer = GrowingBuffer()
    tensor, new = buffer.reserve(100_000)
    assert new and tensor.numel() >= 100_000
    assert buffer.reserve(100_001) == (tensor, False)
    larger, new = buffer.reserve(1_000_000)
    assert new and larger.numel() >= 1_000_000


def test_very_large_buffer_is_not_kept(monkeypatch):
    assert KEPT >= 1 << 28
    monkeypatch.setattr(shared_memory, "KEPT", 1 << 20)
    buffer = GrowingBuffer()
    assert buffer.reserve((1 << 20) + 1)[0].numel() == (1 << 20) + 1
    buffer.settle()
    assert buffer.memory is None


def test_announced_sizes_are_checked():
    memory = SharedMemory.create(100)
    with pytest.raises(ValueError, match="the descriptor has fewer"):
        SharedMemory.received(os.dup(memory.descriptor), 101)
    received = ReceivedBuffer()
    with pytest.raises(ValueError, match="announced"):
        received.message(1)
    received.replace(SharedMemory.received(os.dup(memory.descriptor), 100))
    with pytest.raises(ValueError, match="announced"):
        received.message(101)
    memory.close()
    received.close()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="only memfds can be sealed")
def test_peer_cannot_shrink_memory_that_is_mapped_here():
    memory = SharedMemory.create(5000)
    with pytest.raises(PermissionError):
        os.ftruncate(memory.descriptor, 0)
    memory.close()


def test_a_buffer_of_inference_mode_is_written_to_outside_of_it():
    """ComfyUI calls from its nodes, in inference mode, and frees memory from a thread that is not."""
    buffer = GrowingBuffer()
    with torch.inference_mode():
        buffer.reserve(100)
    tensor, new = buffer.reserve(50)
    tensor[:4].copy_(torch.arange(4, dtype=torch.uint8))
    assert not new and tensor[:4].tolist() == [0, 1, 2, 3]
    buffer.close()


def answer(answers, lent, size, value):
    """One answer of `size` bytes, all of them `value`, on its way to the reader: (what it reads, its to keep)."""
    number, buffer, memory = answers.reserve(size, lent.lent())
    buffer[:size] = value
    if memory is not None:
        lent.replace(number, SharedMemory.received(os.dup(memory.descriptor), memory.size))
    return lent.message(number, size)


def test_answers_stay_as_long_as_somebody_looks_at_them(kind):
    answers, lent = Answers(), LentAnswers()
    kept = [answer(answers, lent, WORTH_LENDING, value) for value in range(MAX_LENT + 2)]
    assert [ours for _, ours in kept] == [True] * MAX_LENT + [False] * 2, "the rest is for the reader to copy"
    kept = [message[1:].view(torch.int8)[::2] for message, _ in kept[:MAX_LENT]]  # a view keeps it too
    kept[0] += 50
    for round_ in range(3):
        assert [int(view[0]) for view in kept] == [50, 1, 2]
        assert all(view.eq(view[0]).all() for view in kept)
        assert not answer(answers, lent, WORTH_LENDING, 100 + round_)[1]
    answers.close()
    lent.close()
    assert int(kept[2].sum()) == 2 * len(kept[2]), "and longer than the line"


def test_answers_come_in_the_same_memory_when_nobody_looks():
    answers, lent = Answers(), LentAnswers()
    addresses = set()
    for value in range(5):
        message, ours = answer(answers, lent, 2 * WORTH_LENDING, value)
        assert ours and int(message[-1]) == value
        addresses.add(message.data_ptr())
        del message
    assert len(addresses) == 1 and lent.lent() == []
    assert not answer(answers, lent, WORTH_LENDING - 1, 9)[1], "small ones are copied"


def test_a_very_large_answer_is_given_back_by_both_ends(monkeypatch):
    monkeypatch.setattr(shared_memory, "KEPT", 1 << 20)
    answers, lent = Answers(), LentAnswers()
    for value in range(3):
        message, ours = answer(answers, lent, (1 << 20) + 1, value)
        assert ours
        answers.settle()
        lent.settle()
        assert int(message[-1]) == value


def test_answers_that_are_kept_have_a_bound_together(monkeypatch):
    monkeypatch.setattr(shared_memory, "KEPT", 5 * WORTH_LENDING)
    answers, lent = Answers(), LentAnswers()

    def round_():
        """Three answers at once; the sizes that both ends have kept when they are gone."""
        taken = []
        for value in range(3):
            taken.append(answer(answers, lent, 2 * WORTH_LENDING, value)[0])
            answers.settle()
            lent.settle()
        assert [int(message[-1]) for message in taken] == [0, 1, 2]
        ends = [[buffer.memory.size for buffer in end._buffers.values() if buffer.memory] for end in (answers, lent)]
        assert ends[0] == ends[1]
        return ends[0]

    assert round_() == round_() == [2 * WORTH_LENDING] * 2
