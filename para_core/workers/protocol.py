"""What travels: a payload of plain values and tensors as one flat block of bytes, and back.

A block is the magic, the header's length, the header (JSON) and the data of tensors, bytes and long strings, each
piece at a multiple of 64 bytes. In the header a list is a list, a scalar itself, and every object a tag:
{"d": [[key, value], ...]} a dict, {"b": [offset, length]} bytes, {"u": [offset, length]} a string in UTF-8,
{"t": [dtype, shape, offset]} a tensor, {"s": [number, [[dtype, shape, offset], ...]]} the tensors of shared block
`number`. Nothing in it is code: whatever the bytes are, decode returns plain values or raises ProtocolError.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

MAGIC = b"PARAMSG1"
PROLOGUE = struct.Struct("<8sQ")
ALIGNMENT = 64
LONG_STRING = 1024  # characters; longer ones travel as data
MAX_SHARED = 64  # blocks in one payload: each is a file descriptor of the message

Payload = None | bool | int | float | str | bytes | torch.Tensor | list | tuple | dict


class ProtocolError(ValueError):
    """The bytes are no message of ours."""


@dataclass(frozen=True)
class Shared:
    """Tensors that stay, such as weights: placed once, in one block that all ranks of a machine map.

    A service receives a list of CPU tensors, views of that block; what a rank writes into one stays its own (its
    pages are copied then). A tensor that occurs twice in the list is placed once.
    """

    tensors: list[torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Of the block, but for gaps between its tensors."""
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in self.tensors}.values())


@dataclass
class Block:
    """Pieces on their way into one flat buffer; offsets count from the first piece."""

    size: int = 0
    pieces: list[tuple[int, torch.Tensor]] = field(default_factory=list)

    def add(self, tensor: torch.Tensor) -> int:
        offset = _aligned(self.size)
        self.pieces.append((offset, tensor))
        self.size = offset + tensor.numel() * tensor.element_size()
        return offset

    def write(self, buffer: torch.Tensor, start: int = 0) -> None:
        """buffer: (size,) uint8 on the CPU, its first byte at a multiple of 64."""
        for offset, tensor in self.pieces:
            size = tensor.numel() * tensor.element_size()
            if not size:
                continue
            target = buffer[start + offset : start + offset + size]
            if tensor.is_contiguous():
                target.copy_(tensor.reshape(-1).view(torch.uint8))
            else:
                target.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Message:
    """A payload ready to be written.

    size: bytes that write needs. shared: the blocks that the payload's Shared values fill, in the order of their
    numbers. Raises ValueError for a value that cannot travel, saying where in the payload it is.
    """

    def __init__(self, payload: Payload) -> None:
        self.data = Block()
        self.shared: list[Block] = []
        try:
            self._header = json.dumps(self._tagged(payload, "payload"), separators=(",", ":")).encode()
        except RecursionError:
            raise ValueError("the payload is nested too deeply, or contains itself; flatten it") from None
        self._start = _aligned(PROLOGUE.size + len(self._header))
        self.size = self._start + self.data.size

    def write(self, buffer: torch.Tensor) -> None:
        """buffer: (>= size,) uint8 on the CPU, its first byte at a multiple of 64."""
        head = PROLOGUE.pack(MAGIC, len(self._header)) + self._header
        buffer[: len(head)].copy_(torch.frombuffer(bytearray(head), dtype=torch.uint8))
        self.data.write(buffer, self._start)

    def _tagged(self, value: Payload, where: str) -> object:
        match value:
            case None | bool() | int() | float():
                return value
            case str() if len(value) <= LONG_STRING:
                return value
            case str():
                return {"u": self._bytes(value.encode("utf-8", "surrogatepass"))}
            case bytes() | bytearray() | memoryview():
                return {"b": self._bytes(value)}
            case torch.Tensor():
                return {"t": _described(self.data, value, where)}
            case list() | tuple():
                return [self._tagged(item, f"{where}[{index}]") for index, item in enumerate(value)]
            case dict():
                return {
                    "d": [[_key(key, where), self._tagged(item, f"{where}[{key!r}]")] for key, item in value.items()]
                }
            case Shared():
                return {"s": self._placed(value.tensors, where)}
        raise ValueError(
            f"{where} is a {type(value).__name__}, which does not travel to the ranks; "
            "send None, bool, int, float, str, bytes, tensors, lists, tuples and dicts of these, or Shared"
        )

    def _bytes(self, value: bytes | bytearray | memoryview) -> list[int]:
        flat = bytearray(value)
        tensor = torch.frombuffer(flat, dtype=torch.uint8) if flat else torch.empty(0, dtype=torch.uint8)
        return [self.data.add(tensor), len(flat)]

    def _placed(self, tensors: list[torch.Tensor], where: str) -> list:
        if len(self.shared) == MAX_SHARED:
            raise ValueError(f"{where} is Shared number {MAX_SHARED + 1}; put the tensors into one Shared instead")
        block, places = Block(), {}
        self.shared.append(block)
        for index, tensor in enumerate(tensors):
            if id(tensor) not in places:
                places[id(tensor)] = _described(block, tensor, f"{where}.tensors[{index}]")
        return [len(self.shared) - 1, [places[id(tensor)] for tensor in tensors]]


def as_it_lies(piece: torch.Tensor) -> torch.Tensor:
    """An `own` of decode: a view of the buffer."""
    return piece


def decode(buffer: torch.Tensor, shared: list[torch.Tensor], *, own: Callable[[torch.Tensor], torch.Tensor]) -> Payload:
    """The payload in buffer, (size,) uint8.

    shared: the flat buffers of its Shared values. own: gives the tensor that is handed out for a piece of the buffer
    (uint8), such as a copy on the rank's device; tensors of Shared values stay views.
    Raises ProtocolError where the bytes are no whole message.
    """
    try:
        head = bytes(buffer[: PROLOGUE.size].numpy())
        magic, length = PROLOGUE.unpack(head)
        if magic != MAGIC or length > buffer.numel() - PROLOGUE.size:
            raise ProtocolError("no message: wrong magic or length")
        header = json.loads(bytes(buffer[PROLOGUE.size : PROLOGUE.size + length].numpy()))
        return _Reader(buffer[min(_aligned(PROLOGUE.size + length), buffer.numel()) :], shared, own).value(header)
    except ProtocolError:
        raise
    except (
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RuntimeError,
        MemoryError,
        OverflowError,
        struct.error,
    ) as error:
        raise ProtocolError(f"no message: {type(error).__name__}: {error}") from error


@dataclass
class _Reader:
    data: torch.Tensor
    shared: list[torch.Tensor]
    own: Callable[[torch.Tensor], torch.Tensor]

    def value(self, header: object) -> Payload:
        if isinstance(header, list):
            return [self.value(item) for item in header]
        if not isinstance(header, dict):
            return header
        ((tag, content),) = header.items()
        match tag:
            case "d":
                return {_key(key, "message"): self.value(item) for key, item in content}
            case "b":
                return self._bytes(*content)
            case "u":
                return self._bytes(*content).decode("utf-8", "surrogatepass")
            case "t":
                return _typed(self.data, *content, own=self.own)
            case "s":
                number, tensors = content
                block = self.shared[number]
                return [_typed(block, *tensor, own=as_it_lies) for tensor in tensors]
        raise ProtocolError(f"no message: tag {tag!r:.40}")

    def _bytes(self, offset: int, length: int) -> bytes:
        return _piece(self.data, offset, length).numpy().tobytes()


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _key(key: object, where: str) -> None | bool | int | float | str:
    if key is None or isinstance(key, (bool, int, float, str)):
        return key
    raise ValueError(f"{where} has a key of type {type(key).__name__}; use str, int, float, bool or None as keys")


def _described(block: Block, tensor: object, where: str) -> list:
    """[dtype, shape, offset] of a tensor added to block."""
    plain = isinstance(tensor, torch.Tensor) and type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        kind = f"{type(tensor).__name__}, {getattr(tensor, 'layout', '-')}, {getattr(tensor, 'device', '-')}"
        raise ValueError(f"{where} is no plain dense tensor ({kind}); send the tensors that it is made of instead")
    resolved = tensor.detach().resolve_conj().resolve_neg()
    return [str(tensor.dtype).removeprefix("torch."), list(tensor.shape), block.add(resolved)]


def _piece(data: torch.Tensor, offset: int, length: int) -> torch.Tensor:
    if type(offset) is not int or type(length) is not int or not 0 <= offset <= offset + length <= data.numel():
        raise ProtocolError(f"no message: piece at {offset!r:.40} of length {length!r:.40}")
    return data[offset : offset + length]


def _typed(
    data: torch.Tensor, dtype: str, shape: list[int], offset: int, *, own: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    kind = getattr(torch, dtype)
    if not isinstance(kind, torch.dtype) or not all(type(size) is int and size >= 0 for size in shape):
        raise ProtocolError(f"no message: tensor of {dtype!r:.40} and shape {shape!r:.200}")
    piece = own(_piece(data, offset, math.prod(shape) * kind.itemsize))
    return piece.view(kind).view(shape)
