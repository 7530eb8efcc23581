"""Drives a model call on one of several ranks: the blocks get this rank's tokens, and the last one's are gathered."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .families import Attention, BlockStack, ModelFamily, Sharding
from .streams import Result
from .token_splits import Arguments, SequenceRanks, TokenSplits

Residuals = Mapping[str, list[Tensor | None]]


def sharding_obstacle(model: nn.Module, family: ModelFamily) -> str | None:
    """Why the tokens of this model cannot be split among ranks; None if they can."""
    known = _is_named(type(model), (*family.classes, *family.sharded))
    for cls in (type(model),) if known else type(model).__mro__:
        for name, reason in family.unsharded.items():
            if _is_named(cls, (name,)):
                return reason
    if not known:  # a subclass may do anything between its blocks
        return "what it does between its blocks is not known"
    for stack in (*family.stacks, *family.branches):
        if stack.sharding is None and stack.blocks_in(model):
            return f"it is not known how the tokens in `{stack.blocks}` are to be split"
    return None


def refuse_unsharded(model: nn.Module, family: ModelFamily) -> None:
    """Raises ValueError, with the reason, for a model whose tokens cannot be split among ranks."""
    obstacle = sharding_obstacle(model, family)
    if obstacle is not None:
        raise ValueError(
            f"{type(model).__name__} cannot run on several devices: {obstacle}. Run it on one device: "
            "remove the Context-Parallel Launcher."
        )


def _is_named(cls: type, names: Iterable[str]) -> bool:
    return any(f".{cls.__module__}.{cls.__qualname__}".endswith(f".{name}") for name in names)


class ShardedCall:
    """One forward of one model. `block` stands in for every block of the family's stacks, in execution order.

    num_blocks: blocks of each of the family's stacks. residuals: what the host will add to the image tokens behind
    the blocks, in lists of this call's own; cut to this rank's tokens when they are known. finished: the last block
    has run.
    """

    def __init__(
        self, family: ModelFamily, num_blocks: Sequence[int], ranks: SequenceRanks, residuals: Residuals | None = None
    ) -> None:
        positions = [(stack, index) for stack, count in enumerate(num_blocks) for index in range(count)]
        self._family, self._num_blocks, self._ranks, self._residuals = family, num_blocks, ranks, residuals or {}
        self._first, self._last = positions[0], positions[-1]
        self._splits = TokenSplits(ranks)
        self._masks: dict[Hashable, tuple[Tensor, Tensor]] = {}
        self._sharding: Sharding | None = None
        self._attentions: Iterator[Attention] = iter(())
        self.finished = self._computed = self._attended = False

    def block(self, stack: int, index: int, arguments: Arguments, compute: Callable[[Arguments], Result]) -> Result:
        """What block `index` of stack number `stack` returns, for this rank's tokens; for all behind the last block.

        arguments: everything that its `forward` is called with. compute: runs the block on what belongs to this rank.
        """
        streams = self._family.stacks[stack].streams
        if (stack, index) == self._first:
            arguments = self._splits.decide(streams, arguments)
            self._cut_residuals()
        self.finished = (stack, index) == self._last
        result = self._run(self._family.stacks[stack], arguments, compute)
        if self._splits and self._computed and not self._attended:
            raise ValueError(
                "the attention of the blocks is not seen, so it would only be over this rank's tokens; needed is the "
                "host's usual attention. Undo what has exchanged it."
            )
        return self._splits.gathered(streams, result, self._family.cached) if self.finished else result

    def branch(self, stack: BlockStack, arguments: Arguments, compute: Callable[[Arguments], Result]) -> Result:
        """What a block of a side branch returns; the host adds it to this rank's tokens, or to all at the end."""
        result = self._run(stack, arguments, compute)
        if not self.finished:
            return result
        return self._splits.gathered(stack.sharding.streams, result, self._family.cached)

    def _run(self, stack: BlockStack, arguments: Arguments, compute: Callable[[Arguments], Result]) -> Result:
        if not self._splits:
            return compute(arguments)
        _refuse_switches(stack.sharding, arguments)
        self._sharding, self._attentions = stack.sharding, iter(stack.sharding.attentions)
        try:
            return compute(self._splits.local(stack.sharding, arguments))
        finally:
            self._attentions = iter(())

    def computed(self, result: Result) -> Result:
        """To be told what a block itself returns: those around it may have left it out."""
        self._computed = True
        return result

    def next_attention(self) -> Attention | None:
        """What the attention that is called now runs over; None if it is this rank's own affair."""
        over = next(self._attentions, None) or None
        self._attended |= over is not None
        return over

    def attention(self, over: Attention, q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, **options) -> Tensor:
        """Of this rank's queries to the keys on all ranks. q, k, v: (B, H, S of this rank, D)."""
        queries, keys = over if isinstance(over[0], tuple) else (over, over)
        lengths, key_lengths = (self._splits.layout(names, in_attention=True).lengths for names in (queries, keys))
        if mask is not None:
            options["mask"] = self._mask(keys, mask)
        return self._ranks.attention(q, k, v, lengths, key_lengths=key_lengths, **options)

    def max(self, values: Tensor) -> Tensor:
        """The largest of each over all ranks; the tensor itself is overwritten."""
        return self._ranks.max(values)

    def _cut_residuals(self) -> None:
        """Those behind all blocks but the last, whose is added to the gathered tokens."""
        for number, (stack, count) in enumerate(zip(self._family.stacks, self._num_blocks, strict=True)):
            residuals = self._residuals.get(stack.sharding.residuals, []) if self._splits else []
            last = count - 1 if number == self._last[0] else count
            for index, residual in enumerate(residuals[:last]):
                if residual is not None:
                    split = self._splits[("img",)]
                    # They may be about the first image tokens only.
                    low, high = (min(end, residual.shape[1]) for end in (split.start, split.start + split.length))
                    residuals[index] = self._padded(stack, residual[:, low:high])

    def _padded(self, stack: BlockStack, residual: Tensor) -> Tensor:
        """Where the image is in front of the text, the host adds to as many tokens as the image has on all ranks."""
        stream = stack.stream_with("img")
        if stream.holds[-1] == "img":
            return residual
        added = min(self._splits[("img",)].total, self._splits.layout(stream.holds).length)
        return torch.nn.functional.pad(residual, (0, 0, 0, added - residual.shape[1]))

    def _mask(self, names: tuple[str, ...], mask: Tensor) -> Tensor:
        """The mask with the keys in the order in which the ranks hold them, and its rows too where it has several."""
        layout, local, key = (
            self._splits.layout(names, in_attention=True),
            self._sharding.mask_is_local,
            (id(self._sharding), names),
        )
        if key in self._masks and (local or self._masks[key][0] is mask):
            return self._masks[key][1]
        if local:
            found = self._ranks.gather(mask, -1, layout.lengths)
        else:
            order = layout.rank_major(mask.device)
            found = mask.index_select(-1, order)
            found = found.index_select(-2, order) if mask.shape[-2] > 1 else found
        self._masks[key] = (mask, found)
        return found


def _refuse_switches(sharding: Sharding, arguments: Arguments) -> None:
    options = arguments.get("transformer_options") or {}
    for name, needed in sharding.switches.items():
        if bool(options.get(name, needed)) != needed:
            raise ValueError(
                f"`{name}` is {options[name]} in the transformer options; on several devices it must be {needed}. "
                "Remove the node that sets it, or the Context-Parallel Launcher."
            )
