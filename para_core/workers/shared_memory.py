"""Memory that processes share by passing its file descriptor on: without a name, so nothing can be left behind.

It is a memfd; where Python was built without (conda's may be), a file in the temporary folder, unlinked at once.
"""

from __future__ import annotations

import itertools
import mmap
import os
import tempfile
import weakref
from collections.abc import Collection

import torch

NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python names it since 3.13
KEPT = 1 << 30  # bytes; a larger buffer serves one message
SMALLEST = 1 << 16
WORTH_LENDING = 1 << 20  # bytes; a smaller answer is copied
MAX_LENT = 3  # answers; samplers of high order keep that many results of the model


class SharedMemory:
    """size bytes behind a descriptor that this process owns.

    mapped(): a (size,) uint8 tensor of the memory itself; private=True maps it copy-on-write: pages are common until
    the process writes to them. The mapping lives as long as its tensors, also after close().
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self.size = size

    @classmethod
    def create(cls, size: int) -> SharedMemory:
        if not hasattr(os, "memfd_create"):
            descriptor, name = tempfile.mkstemp(prefix="para_workers_")
            os.unlink(name)
            os.ftruncate(descriptor, size)
            return cls(descriptor, size)
        import fcntl  # Windows has none, and imports this file

        descriptor = os.memfd_create("para_workers", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(descriptor, size)
            # A peer that maps it must never meet SIGBUS because it shrank.
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        except OSError:
            os.close(descriptor)
            raise
        return cls(descriptor, size)

    @classmethod
    def received(cls, descriptor: int, size: int) -> SharedMemory:
        """Takes the descriptor over. Raises ValueError where less than size bytes are behind it."""
        memory = cls(descriptor, size)
        if size < 0 or os.fstat(descriptor).st_size < size:
            memory.close()
            raise ValueError(f"{size} bytes are announced, but the descriptor has fewer")
        return memory

    def mapped(self, *, private: bool = False) -> torch.Tensor:
        if not self.size:
            return torch.empty(0, dtype=torch.uint8)
        flags = mmap.MAP_PRIVATE | NO_RESERVE if private else mmap.MAP_SHARED
        return _tensor_of(mmap.mmap(self.descriptor, self.size, flags=flags))

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class PrivateMapping:
    """Memory that comes anew from one message to the next, copy-on-write here; mapping it takes as long as copying it.

    forgets_writes(): the pages that were written here are common again; False where this system cannot tell.
    """

    PAGEMAP = "/proc/self/pagemap"  # of Linux, Documentation/admin-guide/mm/pagemap.rst
    PRESENT, SWAPPED, COMMON = 63, 62, 61

    def __init__(self, memory: SharedMemory) -> None:
        self._map = mmap.mmap(memory.descriptor, memory.size, flags=mmap.MAP_PRIVATE | NO_RESERVE)
        self.tensor = _tensor_of(self._map)

    def forgets_writes(self) -> bool:
        first, past = (at // mmap.PAGESIZE for at in (self.tensor.data_ptr(), self.tensor.data_ptr() + len(self._map)))
        try:
            with open(self.PAGEMAP, "rb", buffering=0) as file:
                pages = torch.frombuffer(
                    bytearray(os.pread(file.fileno(), (past - first) * 8, first * 8)), dtype=torch.int64
                )
        except OSError:
            return False
        here = (pages >> self.PRESENT | pages >> self.SWAPPED) & ~(pages >> self.COMMON) & 1
        if here.any():
            self._map.madvise(mmap.MADV_DONTNEED)
        return len(pages) == past - first


def _tensor_of(mapping: mmap.mmap) -> torch.Tensor:
    # A normal tensor whoever maps it: an inference tensor could not be written to outside of inference mode.
    with torch.inference_mode(False):
        return torch.frombuffer(mapping, dtype=torch.uint8)


class Buffer:
    """Memory that holds one message after the other, mapped here."""

    def __init__(self) -> None:
        self.memory: SharedMemory | None = None
        self._tensor: torch.Tensor | None = None

    def replace(self, memory: SharedMemory) -> None:
        self.close()
        self.memory, self._tensor = memory, memory.mapped()

    def settle(self) -> None:
        """After a message: both ends give back what is too large to keep."""
        if self.memory is not None and self.memory.size > KEPT:
            self.close()

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
        self.memory = self._tensor = None


class GrowingBuffer(Buffer):
    """What one side's messages are written to; replaced by a larger one when needed."""

    def reserve(self, size: int) -> tuple[torch.Tensor, bool]:
        """A uint8 tensor of at least size bytes, and whether it is new to the peer."""
        if self.memory is not None and size <= self.memory.size:
            return self._tensor, False
        self.replace(SharedMemory.create(max(SMALLEST, size if size > KEPT else 1 << (size - 1).bit_length())))
        return self._tensor, True


class ReceivedBuffer(Buffer):
    """The peer's GrowingBuffer."""

    def __init__(self) -> None:
        super().__init__()
        self._private: PrivateMapping | None = None

    def message(self, size: int, *, private: bool = False) -> torch.Tensor:
        """private: in a mapping of its own, where writing reaches nobody else; until the peer's next message.

        Raises ValueError where the peer announces more than it has sent.
        """
        if self.memory is None or not 0 <= size <= self.memory.size:
            raise ValueError(f"a message of {size} bytes is announced in a buffer that is smaller")
        return (self._own(self.memory) if private else self._tensor)[:size]

    def close(self) -> None:
        super().close()
        self._private = None

    def _own(self, memory: SharedMemory) -> torch.Tensor:
        if self._private is None or not self._private.forgets_writes():
            self._private = PrivateMapping(memory)
        return self._private.tensor


class Shelf:
    """Buffers by number, the same at both ends after each message."""

    def __init__(self) -> None:
        self._buffers: dict[int, Buffer] = {}

    def settle(self) -> None:
        """After a message: both ends give back what is too much to keep, the highest numbers first."""
        kept = 0
        for _, buffer in sorted(self._buffers.items()):
            if buffer.memory is not None and kept + buffer.memory.size > KEPT:
                buffer.close()
            kept += 0 if buffer.memory is None else buffer.memory.size

    def close(self) -> None:
        for buffer in self._buffers.values():
            buffer.close()
        self._buffers.clear()


class Answers(Shelf):
    """The memory of answers, at the end that writes them: one that the reader still uses is left alone."""

    def reserve(self, size: int, lent: Collection[int]) -> tuple[int, torch.Tensor, SharedMemory | None]:
        """A number that is not lent, a uint8 tensor of at least size bytes, and its memory where the reader has none.

        lent: the numbers that the reader still uses.
        """
        number = next(number for number in itertools.count() if number not in lent)
        buffer = self._buffers.setdefault(number, GrowingBuffer())
        tensor, new = buffer.reserve(size)
        return number, tensor, buffer.memory if new else None


class LentAnswers(Shelf):
    """The reader's end of Answers: large ones are handed out where they lie, as long as their tensors live."""

    def __init__(self) -> None:
        super().__init__()
        self._readers: dict[int, weakref.ref] = {}

    def lent(self) -> list[int]:
        """The numbers whose tensors live."""
        self._readers = {number: reader for number, reader in self._readers.items() if reader() is not None}
        return list(self._readers)

    def replace(self, number: int, memory: SharedMemory) -> None:
        self._buffers.setdefault(number, ReceivedBuffer()).replace(memory)

    def message(self, number: int, size: int) -> tuple[torch.Tensor, bool]:
        """(size,) uint8, and whether it is the caller's to keep and to write to; else it is until the next answer.

        Raises ValueError where the peer announces more than it has sent.
        """
        message = self._buffers.get(number, ReceivedBuffer()).message(size)
        if size < WORTH_LENDING or len(self.lent()) >= MAX_LENT:
            return message, False
        reader = message.numpy()[:]  # an object of its own, which the tensors' storage keeps alive
        self._readers[number] = weakref.ref(reader)
        with torch.inference_mode(False):
            return torch.from_numpy(reader), True

    def close(self) -> None:
        super().close()
        self._readers.clear()
