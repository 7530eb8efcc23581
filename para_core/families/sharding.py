"""How the blocks of a stack run on a part of the tokens, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .stream import Stream


@dataclass(frozen=True)
class PerToken:
    """An argument of a block's `forward` that says something about each token.

    argument: the parameter's name. holds: the token streams that it is about, in order.
    kind: a tensor; a list of spans (start, end or None, and what holds there) over the tokens; the boundary between
        two kinds of tokens; how many tokens take part in the attention, the others being padding behind them; or
        something that cannot be cut, so that it must be None.
    dims: of a tensor, the tokens are along the first whose size fits; hosts have laid out one argument in several
        ways. A tensor of size 1 there is the same for all tokens.
    part: its index where the argument is a tuple.
    repeats: fewer rows than tokens are allowed; then each row stands for equally many neighbours.
    ndim: a tensor with fewer dims than this is the same for all tokens.
    counted: streams of which the host has counted what this rank holds, since it looked behind the first block.
    """

    argument: str
    holds: tuple[str, ...]
    dims: tuple[int, ...] = (1,)
    kind: Literal["tensor", "spans", "boundary", "crop", "unsupported"] = "tensor"
    part: int | None = None
    repeats: bool = False
    ndim: int = 0
    counted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sharding:
    """How a stack's blocks run on this rank's tokens only.

    attentions: the streams that an attention call inside a block runs over, in their order there, call by call; what
        a call behind these sees is whole on every rank (cross attention to text that is no stream).
    streams: as the stack's, in the words of the blocks' `forward`; by default the stack's own.
    mask_is_local: the block makes its attention mask for the tokens that it is given, the same in every block of the
        stack; otherwise a mask is about all tokens, in the order of the attention.
    residuals: the list in the host's `control` whose entries are added to the image tokens behind each block.
    """

    attentions: tuple[tuple[str, ...], ...]
    per_token: tuple[PerToken, ...] = ()
    streams: tuple[Stream, ...] = ()
    mask_is_local: bool = False
    residuals: str = ""
