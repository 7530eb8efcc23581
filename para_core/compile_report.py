"""What compiling a model cost: which kinds of blocks, how often, how long, and why again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Compiled:
    """One compilation. name: of the kind of block; reason: why it was not the first of its kind, empty if it was."""

    name: str
    seconds: float
    reason: str = ""

    def __str__(self) -> str:
        return f"  {self.name}: {self.seconds:.1f} s" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class CompileReport:
    """The numbers of one run, and of everything compiled for this model so far.

    compiled: in this run, in order. num_compilations, total_seconds: of the model since it was loaded.
    num_blocks, num_kinds: that the run found to compile. uncompiled: block calls that ran as they are, by reason.
    compiling: the kind that is being compiled right now, for so many seconds.
    cache_bytes: on disk; None without a directory for artifacts.
    """

    compiled: tuple[Compiled, ...] = ()
    num_compilations: int = 0
    total_seconds: float = 0.0
    num_blocks: int = 0
    num_kinds: int = 0
    uncompiled: Mapping[str, int] = field(default_factory=dict)
    compiling: str | None = None
    compiling_seconds: float = 0.0
    cache_bytes: int | None = None
    finished: bool = False

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.compiled)

    @property
    def recompiled(self) -> tuple[Compiled, ...]:
        return tuple(one for one in self.compiled if one.reason)

    @property
    def num_kinds_compiled(self) -> int:
        """Kinds of blocks of which this run has compiled something."""
        return len({one.name for one in self.compiled})

    def summary(self) -> str:
        """One line: what goes on, or what the run has come to."""
        if self.compiling is not None:
            return f"compiling {self.compiling}, {self.compiling_seconds:.0f} s"
        parts = [
            f"{len(self.compiled)} compilations in {self.seconds:.1f} s" if self.compiled else "nothing to compile"
        ]
        if self.recompiled:
            parts.append(f"{len(self.recompiled)} of them recompilations ({self.recompiled[-1].reason})")
        parts.append(f"{self.num_blocks} blocks")
        parts += [f"{count} block calls uncompiled: {reason}" for reason, count in self.uncompiled.items()]
        return "Compile Model: " + "; ".join(parts)

    def text(self) -> str:
        """The summary, a line for each compilation, and what is kept."""
        lines = [self.summary()]
        lines += map(str, self.compiled)
        lines.append(f"  since the model was loaded: {self.num_compilations} compilations, {self.total_seconds:.1f} s")
        if self.cache_bytes:
            lines.append(f"  kept for the next start: {self.cache_bytes / 2**20:.1f} MiB")
        return "\n".join(lines)
