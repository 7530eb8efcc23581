"""How a call can end without a result."""

from __future__ import annotations


class WorkerError(RuntimeError):
    """A rank raised, or was lost more often than max_restarts allows.

    rank: None where the loss cannot be laid to one. details: its traceback, or the last lines it wrote.
    """

    def __init__(self, message: str, *, rank: int | None = None, details: str = "") -> None:
        super().__init__(f"{message}\n{details}" if details else message)
        self.rank = rank
        self.details = details


class Cancelled(Exception):
    """The caller's `cancelled` returned true."""


def closed() -> WorkerError:
    """What is raised by a group that is no more."""
    return WorkerError("the group is closed; start another one")


def cause_of(traceback: str) -> str:
    """The line of a formatted traceback that says what was raised; its message may have further lines."""
    lines = traceback.splitlines() or [""]
    frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
    behind = lines[frames[-1] + 1 :] if frames else lines
    return next((line for line in behind if line and not line[0].isspace()), lines[-1])
