"""What a model family is, as data: where its repeated blocks are and which token streams pass through them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stream:
    """One tensor that a block takes and returns.

    argument: its key in the hook's argument dict, or the parameter name of the block's `forward`.
    result: its key in the hook's result dict, or its index in the tuple that `forward` returns (None: a bare tensor).
    holds: the token streams inside it, in order along `token_dim`.
    """

    argument: str
    result: str | int | None
    holds: tuple[str, ...]
    token_dim: int = 1


@dataclass(frozen=True)
class BlockStack:
    """A run of alike blocks, executed in order.

    blocks: attribute of the diffusion model that holds them.
    hook: the name under which the host lets a block be replaced (`patches_replace["dit"][(hook, index)]`);
        None where it offers none, then `block.forward` is swapped for the duration of one model call.
    in_place: whether a block, or the host between two blocks, writes into the tensors it was given.
    """

    blocks: str
    streams: tuple[Stream, ...]
    hook: str | None = None
    in_place: bool = False

    def stream_with(self, name: str) -> Stream:
        """The stream that holds the tokens `name`."""
        return next(stream for stream in self.streams if name in stream.holds)


@dataclass(frozen=True)
class ModelFamily:
    """Models that share one block layout.

    classes: class names of the diffusion model; a subclass matches too.
    refuses: class names that match but cannot be served, with the reason.
    cached: the token stream whose residual is kept; it leaves the last stack and feeds the output layer.
    residual_diff_threshold: what the patcher uses when the user leaves the choice to it; 28 to 50 steps assumed.
    """

    name: str
    classes: tuple[str, ...]
    stacks: tuple[BlockStack, ...]
    cached: str = "img"
    refuses: Mapping[str, str] = field(default_factory=dict)
    residual_diff_threshold: float = 0.1
