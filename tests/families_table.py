"""python -m tests.families_table: the README's table of what the cache serves, made from the data and the tests."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]

from tiny_models import TINY_MODELS  # noqa: E402

from para_core.families import FAMILIES, REASONS, ModelFamily  # noqa: E402

OLDER, NEWER = "0.3.64", "0.33.0"
HEADER = (
    "Models",
    "Block stacks",
    "Reached through",
    "Recommended threshold",
    "Context parallel",
    f"ComfyUI {OLDER}",
    f"ComfyUI {NEWER}",
)


def table() -> str:
    """A row for each family that ComfyUI's models belong to, and what is refused."""
    rows = [HEADER, tuple("---" for _ in HEADER), *(_row(family) for family in _families())]
    refused = [f"- `{name}`: {reason}" for name, reason in sorted(REASONS.items())]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    reasons = [(name, reason) for family in FAMILIES for name, reason in sorted(family.unsharded.items())]
    alone = [f"- `{name.split('.')[-1]}`: {reason}" for name, reason in dict.fromkeys(reasons)]
    lines += ["", "Refused by name:", "", *refused]
    return "\n".join([*lines, "", "On several devices these are refused by name as well:", "", *alone])


def _families() -> list[ModelFamily]:
    tested = {tiny.family for tiny in TINY_MODELS.values()}
    # One layout of a family stands for the others.
    named = {family.name: family for family in reversed(FAMILIES) if family.name in tested}
    return sorted(named.values(), key=lambda family: family.models.lower())


def _row(family: ModelFamily) -> tuple[str, ...]:
    ways = dict.fromkeys(f"hook `{stack.hook}`" if stack.hook else "`block.forward`" for stack in family.stacks)
    return (
        family.models,
        ", ".join(f"`{stack.blocks}`" for stack in family.stacks),
        ", ".join(ways),
        f"{family.residual_diff_threshold:g}",
        _sharded(family),
        _tested(family, OLDER),
        _tested(family, NEWER),
    )


def _sharded(family: ModelFamily) -> str:
    """yes, or why not; a family of which some classes are refused has them in the list below the table."""
    refused = [reason for name, reason in family.unsharded.items() if name in family.classes]
    if refused:
        return f"no: {refused[0]}"
    return "yes, except those below" if family.unsharded else "yes"


def _tested(family: ModelFamily, version: str) -> str:
    """yes, no, or what of the family this ComfyUI has."""
    tinies = [tiny for tiny in TINY_MODELS.values() if tiny.family == family.name]
    titles = [tiny.title for tiny in tinies if _numbers(tiny.since) <= _numbers(version)]
    if len(titles) == len(tinies):
        return "yes"
    return ", ".join(titles) or "not in it"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
