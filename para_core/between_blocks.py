"""How much others add between the blocks (a ControlNet does): block 0, by which the cache decides, does not see it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

SAMPLE = 4096  # values of a tensor
JUMP = 2.0


def loudness(added: object) -> tuple[float, ...]:
    """Root mean square of each tensor in nested sequences and mappings, 0 for None; empty where there is nothing.

    A sample of at most SAMPLE values of each is looked at. Waits for the device once.
    """
    found = list(_leaves(added))
    squares = [_sampled(tensor).float().square().mean() for tensor in found if tensor is not None]
    if not squares:
        return ()
    levels = iter(torch.stack([square.to(squares[0].device) for square in squares]).sqrt().tolist())
    return tuple(0.0 if tensor is None else next(levels) for tensor in found)


def jumped(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether something was added or left out, or became more than JUMP times as loud or as quiet.

    Less than that happens as the noise goes; the residual of the skipped blocks holds what was added, and is continued.
    """
    if not any(before) and not any(now):
        return False
    pairs = zip(before, now, strict=True) if len(before) == len(now) else [(0.0, 1.0)]
    return any(not max(pair) <= JUMP * min(pair) for pair in pairs)


def _leaves(value: object) -> Iterator[Tensor | None]:
    if value is None or (isinstance(value, Tensor) and value.numel()):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _leaves(item)


def _sampled(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)[:: -(-tensor.numel() // SAMPLE) | 1]
