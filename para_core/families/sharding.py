"""How the blocks of a stack run on a part of the tokens, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .stream import Stream

# The token streams in their order there; queries and keys apart where they differ.
Attention = tuple[str, ...] | tuple[tuple[str, ...], tuple[str, ...]]


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
    grid: number of dims, from the one in `dims` on, in which the tokens are laid out.
    attribute: the tensor's name where the argument is an object of the host's; a plain tensor takes its place.
    counted: streams of which the host has what this rank holds already, since it looked behind the first block.
    """

    argument: str
    holds: tuple[str, ...]
    dims: tuple[int, ...] = (1,)
    kind: Literal["tensor", "spans", "boundary", "crop", "unsupported"] = "tensor"
    part: int | None = None
    repeats: bool = False
    ndim: int = 0
    grid: int = 1
    attribute: str = ""
    counted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sharding:
    """How a stack's blocks run on this rank's tokens only.

    attentions: what an attention call inside a block runs over, call by call. Of an empty one, and of one behind
        these, every rank has all keys (cross attention to text that is no stream).
    streams: as the stack's, in the words of the blocks' `forward`; by default the stack's own. Of a side branch: what
        the host adds to the streams of the same names.
    mask_is_local: the block makes its attention mask for the tokens that it is given, the same in every block of the
        stack; otherwise a mask is about all tokens, in the order of the attention.
    residuals: the list in the host's `control` whose entries are added to the image tokens behind each block.
    switches: transformer options that change which attentions are called, and how they have to stand.
    """

    attentions: tuple[Attention, ...]
    per_token: tuple[PerToken, ...] = ()
    streams: tuple[Stream, ...] = ()
    mask_is_local: bool = False
    residuals: str = ""
    switches: Mapping[str, bool] = field(default_factory=dict)
