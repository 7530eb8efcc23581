"""What the model calls of one run with the cache share, and where in the schedule each of them is."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .residual_cache import CacheConfig, Reduce, alone


@dataclass(frozen=True)
class Step:
    """Where in the schedule a model call is.

    index: of the sampler step, from 0; num_steps of them in the run, 0: not known. allowed: reuse may happen here.
    at: the time that the model is conditioned on, by default sigma. width: of the step, in sigma; 0: not known.
    foreseeable: nothing but the time changes what block 0 does. controlled: how much is added between the blocks, see
    `between_blocks.loudness`.
    """

    index: int
    sigma: float
    allowed: bool = True
    at: float | None = None
    width: float = 0.0
    num_steps: int = 0
    foreseeable: bool = True
    controlled: tuple[float, ...] = ()

    LAST: ClassVar[float] = 0.07  # of a run: 2 of 28 steps, 4 of 50

    @property
    def is_final(self) -> bool:
        """The last step, for which no later one makes up."""
        return bool(self.num_steps) and self.index == self.num_steps - 1

    @property
    def is_last(self) -> bool:
        """One of the last steps."""
        return bool(self.num_steps) and self.num_steps - self.index <= math.ceil(self.LAST * self.num_steps)

    @property
    def time(self) -> float:
        return self.sigma if self.at is None else self.at


class RunState:
    """What the calls of one run share.

    shapes: what blocks that reshape returned, by what they were given. branch_reaches_end: a branch was added behind
    the last block, where nothing remembers it. reduce: adds up a small tensor over the ranks of a group, each of which
    makes the same calls with some of the tokens; all decide alike, and call it equally often.
    """

    def __init__(self, config: CacheConfig, threshold: float, reduce: Reduce = alone) -> None:
        self.config = config
        self.threshold = threshold
        self.reduce = reduce
        self.shapes: dict[Hashable, torch.Size] = {}
        self.branch_reaches_end = False
