"""What a sampling run on several ranks came to: how they shared it, their memory, and what was lost and made good."""

from __future__ import annotations

from dataclasses import dataclass

from .parallel_notice import NOT_ASKED


@dataclass(frozen=True)
class RankReport:
    """One rank at the end of a run. memory_bytes: the allocator's reserve on CUDA, resident memory on the CPU."""

    device: str
    memory_bytes: int


@dataclass(frozen=True)
class ParallelReport:
    """A finished sampling run.

    mesh: in words. ranks: in order. num_restarts: of the group during the run; after each one what was lost is
    computed again. asked: whether a model call reached the ranks.
    """

    mesh: str
    ranks: tuple[RankReport, ...]
    num_restarts: int
    asked: bool

    def text(self) -> str:
        """A line for each fact."""
        lines = [
            f"Context-Parallel Launcher, {len(self.ranks)} {'rank' if len(self.ranks) == 1 else 'ranks'}: {self.mesh}",
            *(
                f"Rank {number} ({rank.device}): {rank.memory_bytes / 2**20:.0f} MiB"
                for number, rank in enumerate(self.ranks)
            ),
            self._restarts(),
            "" if self.asked else NOT_ASKED,
        ]
        return "\n".join(filter(None, lines))

    def _restarts(self) -> str:
        if not self.num_restarts:
            return "Restarts during the run: none"
        return f"Restarts during the run: {self.num_restarts}; what was lost was computed again, with the same result"
