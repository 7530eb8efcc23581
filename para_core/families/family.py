"""What a model family is, as data: where its repeated blocks are and which token streams pass through them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from .sharding import Sharding
from .stream import Stream


@dataclass(frozen=True)
class BlockStack:
    """A run of alike blocks, executed in order.

    blocks: attribute of the diffusion model that holds them (a list, a dict, a sequence).
    hook: the name under which the host lets a block be replaced (`patches_replace["dit"][(hook, index)]`);
        None where it offers none, then `block.forward` is swapped for the duration of one model call.
    in_place: whether a block, the host or a patch between two blocks writes into the tensors it was given.
    layered: the host calls the layers of each block one by one (UNets); they take the place of the blocks.
    start: this many leading blocks are embedders: they always run, and no residual spans them.
    reshapes: whether results may differ in shape from arguments.
    sharding: how its blocks run on a part of the tokens; None where they cannot.
    """

    blocks: str
    streams: tuple[Stream, ...]
    hook: str | None = None
    in_place: bool = False
    layered: bool = False
    start: int = 0
    reshapes: bool = False
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        assert self.hook is None or not (self.layered or self.start or self.reshapes), "a hook counts whole blocks"

    def blocks_in(self, model: nn.Module) -> list[nn.Module]:
        """The blocks, in the order of execution."""
        holder = getattr(model, self.blocks)
        blocks = [] if holder is None else list(holder.children())
        if self.layered:
            blocks = [layer for block in blocks for layer in block.children()]
        return blocks[self.start :]

    def stream_with(self, name: str) -> Stream:
        """The stream that holds the tokens `name`."""
        return next(stream for stream in self.streams if name in stream.holds)


@dataclass(frozen=True)
class ModelFamily:
    """Models that share one block layout.

    classes: class names of the diffusion model, with as much of the module in front as makes them unambiguous;
        a subclass matches too, unless another family names it.
    branches: blocks beside the stacks, whose results the host adds to a stream behind some of the stacks' blocks.
    marker: attribute path that the models of this layout have, where hosts laid out one class in different ways.
    refuses: class names that match but cannot be served, with the reason.
    cached: the token streams whose residuals are kept; they leave the last stack and feed the output layers.
    residual_diff_threshold: what the patcher uses when the user leaves the choice to it; 28 to 50 steps assumed.
    rounding_noise: what rounding activations to float8 adds to residual differences, independent of their own change.
    models: what people call them.
    sharded: further classes whose tokens can be split among ranks as those of `classes`; other subclasses are refused.
    unsharded: class names whose tokens cannot be, with the reason.
    unquantized: layers inside the blocks that stay in full precision unless asked for; patterns over lower-case names.
    """

    name: str
    classes: tuple[str, ...]
    stacks: tuple[BlockStack, ...]
    cached: tuple[str, ...] = ("img",)
    branches: tuple[BlockStack, ...] = ()
    marker: str = ""
    refuses: Mapping[str, str] = field(default_factory=dict)
    residual_diff_threshold: float = 0.1
    # Published first-block caches go from 0.08 to 0.12 for FLUX.1 dev in dynamic float8: sqrt(0.12**2 - 0.08**2).
    rounding_noise: float = 0.09
    models: str = ""
    sharded: tuple[str, ...] = ()
    unsharded: Mapping[str, str] = field(default_factory=dict)
    unquantized: tuple[str, ...] = ("*mod*", "*norm*", "*emb*")

    def threshold_for(self, rounding: float) -> float:
        """The default threshold where activations are rounded; rounding: how coarsely, 1 as float8 does, 0 not at all.

        Independent changes add up in squares, so that about as many steps are reused as without rounding.
        """
        return math.hypot(self.residual_diff_threshold, rounding * self.rounding_noise)

    def describes(self, model: nn.Module) -> bool:
        """Whether a model of one of the classes has this layout."""
        found: object = model
        for name in filter(None, self.marker.split(".")):
            found = getattr(found, name, None)
        return found is not None

    def through_forward(self) -> ModelFamily:
        """The same family as ranks see it: every block is reached through its `forward`, hook or not."""
        stacks = tuple(
            stack
            if stack.sharding is None
            else replace(stack, hook=None, streams=stack.sharding.streams or stack.streams)
            for stack in self.stacks
        )
        return replace(self, stacks=stacks)
