"""A tensor of tokens that passes through the blocks of a stack."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stream:
    """One tensor that a block takes and returns.

    argument: its key in the hook's argument dict, or of the block's `forward` the parameter's name or position.
    result: its key in the hook's result dict, or its index in the tuple that `forward` returns (None: a bare tensor).
    holds: the token streams inside it, in order along `token_dim`.
    part: its index where argument and result are tuples of several streams.
    batch_dim: along which the host batches conditionings.
    grid: number of dims, from token_dim on, in which the tokens are laid out.
    """

    argument: str | int
    result: str | int | None
    holds: tuple[str, ...]
    part: int | None = None
    token_dim: int = 1
    batch_dim: int = 0
    grid: int = 1
