"""Messages: what goes in comes out, and bytes that are no message are refused."""

from __future__ import annotations

import random

import pytest
import torch

from para_core.workers.protocol import MAX_SHARED, Message, ProtocolError, Shared, decode

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype) and "qint" not in str(value)}, key=str
)


def through(payload):
    message = Message(payload)
    buffer = torch.zeros(message.size, dtype=torch.uint8)
    message.write(buffer)
    shared = []
    for block in message.shared:
        shared.append(torch.zeros(block.size, dtype=torch.uint8))
        block.write(shared[-1])
    return decode(buffer, shared, own=torch.clone)


def of_random_bytes(dtype, shape):
    count = torch.Size(shape).numel() * dtype.itemsize
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8)
    return data.view(dtype).view(shape)


def same_bits(left, right):
    flat = [tensor.reshape(-1).view(torch.uint8) for tensor in (left, right)]
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(*flat)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (5,), (2, 3, 7)], ids=str)
def test_tensors_of_every_dtype_and_shape_keep_their_bits(dtype, shape):
    tensor = of_random_bytes(dtype, shape)
    assert same_bits(through([1, tensor])[1], tensor)


def test_tensors_that_are_not_contiguous():
    base = torch.randn(4, 6, 8)
    tensors = [base.transpose(0, 2), base[:, ::2], base[0, 0, 0].expand(5), base.to(torch.bfloat16).mT]
    tensors += [torch.randn(3, dtype=torch.complex64).conj(), torch.nn.Parameter(base[1:, 1:])]
    for sent, received in zip(tensors, through(tensors), strict=True):
        assert torch.equal(sent, received) and type(received) is torch.Tensor and not received.requires_grad


def test_received_tensors_are_apart_from_the_buffer_and_each_other():
    tensor = torch.zeros(3)
    first, second = through([tensor, tensor])
    first.add_(1)
    assert not second.any()


def test_plain_values():
    sent = {"a": [None, True, -1, 2**80, 0.1, float("inf"), "ä\ud800", ""], 1: {None: b""}, 2.5: b"\0" * 3000}
    assert through(sent) == sent
    assert through((1, (2,))) == [1, [2]]
    assert through({"d": {"t": 1}, "s": [{"b": 2}]}) == {"d": {"t": 1}, "s": [{"b": 2}]}


def test_shared_tensors_are_views_of_one_block():
    weights = [torch.randn(3, 5), torch.ones(2, dtype=torch.float8_e4m3fn), torch.empty(0)]
    message = Message({"weights": Shared([*weights, weights[0]])})
    assert len(message.shared) == 1 and message.size < 400
    received = through({"weights": Shared([*weights, weights[0]])})["weights"]
    assert all(same_bits(*pair) for pair in zip(received, [*weights, weights[0]], strict=True))
    assert received[0].data_ptr() == received[3].data_ptr()
    assert received[0].untyped_storage().data_ptr() == received[1].untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, object()]}, r"payload\['a'\]\[1\] is a object"),
        ({(1,): 2}, "key of type tuple"),
        (torch.eye(2).to_sparse(), "payload is no plain dense tensor"),
        ([torch.empty(2, device="meta")], r"payload\[0\] is no plain dense tensor"),
        (Shared([1]), r"payload.tensors\[0\] is no plain dense tensor"),
        ([Shared([]) for _ in range(MAX_SHARED + 1)], "into one Shared"),
    ],
    ids=["object", "key", "sparse", "meta", "shared", "too many"],
)
def test_what_cannot_travel_is_named(value, message):
    with pytest.raises(ValueError, match=message):
        Message(value)


def test_payload_that_contains_itself():
    endless: list = []
    endless.append(endless)
    with pytest.raises(ValueError, match="contains itself"):
        Message(endless)


def test_ten_thousand_random_truncated_and_altered_messages_are_refused_or_harmless():
    message = Message(
        {"x": torch.arange(6).view(2, 3), "text": "y" * 2000, "w": Shared([torch.ones(4)]), "n": [1, None]}
    )
    sound = torch.zeros(message.size, dtype=torch.uint8)
    message.write(sound)
    shared = [torch.zeros(message.shared[0].size, dtype=torch.uint8)]
    source, refused = random.Random(0), 0
    for round_ in range(10_000):
        match round_ % 4:
            case 0:
                data = torch.frombuffer(bytearray(source.randbytes(source.randint(1, 300))), dtype=torch.uint8)
            case 1:
                data = sound[: source.randrange(message.size)]
            case _:
                data = sound.clone()
                for _ in range(source.randint(1, 4)):
                    data[source.randrange(min(400, message.size))] = source.randrange(256)
        try:
            decode(data, shared if round_ % 8 else [], own=torch.clone)
        except ProtocolError:
            refused += 1
    assert refused > 7000
