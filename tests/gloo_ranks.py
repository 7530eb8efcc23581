"""Processes joined by gloo that stay up for the whole test session and run cases by name; the fixture is `gloo_ranks`.

A case is an importable function below tests/, but not in a test module (pytest gives those other names):

    # tests/attention/cases.py
    def sum_of_ranks(rank, world_size, *, factor):
        total = torch.tensor(rank * factor)
        dist.all_reduce(total)
        return total.item()

    # tests/attention/test_something.py
    def test_ranks_are_added_up(gloo_ranks):
        assert gloo_ranks(2).run("attention.cases.sum_of_ranks", factor=10) == [10, 10]

Arguments and results are pickled, tensors by value. Every rank runs the case in inference mode, with one thread and
seed 0, in the default process group; what a case leaves in its process (groups, modules) the next one finds.
`gloo_ranks(2, comfyui=comfyui)` gives ranks that have ComfyUI's modules, as the fixture `comfy` does for a test.

A case that raises fails the test with rank and traceback, a rank that dies with its signal and last lines, one that
does not answer with where it hangs; the processes are then replaced, so that the next case meets a sound group.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from multiprocessing.connection import Connection, wait
from pathlib import Path

START_TIMEOUT = 120.0  # seconds until all ranks are joined; importing torch takes most of it
GRACE = 5.0  # seconds for the other ranks once one has failed: they may wait for it in a collective
LAST_CHARACTERS = 4000  # of a rank's error stream that are shown


class RanksFailed(AssertionError):
    """A case failed on at least one rank; the message has each one's traceback."""


class Rank:
    """One process and the line to it."""

    def __init__(self, rank: int, arguments: list[str], folder: Path) -> None:
        ours, theirs = socket.socketpair()
        self.log = folder / f"rank{rank}.log"
        command = [sys.executable, str(Path(__file__).with_name("gloo_rank_process.py")), str(theirs.fileno())]
        env = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"}
        with theirs, self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(rank), *arguments], pass_fds=[theirs.fileno()], env=env, stdout=log, stderr=log
            )
        self.line = Connection(ours.detach())

    def answer(self) -> tuple[bool, object]:
        """What the rank has sent: (True, result) or (False, traceback)."""
        try:
            return pickle.loads(self.line.recv_bytes())
        except (EOFError, ConnectionError):
            code = self.process.wait()
            cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return False, f"the process died: {cause}\n{self.last_lines()}"

    def where_it_hangs(self) -> str:
        self.process.send_signal(signal.SIGUSR1)  # faulthandler writes every thread's stack
        time.sleep(0.3)
        return f"no answer in time; it was at\n{self.last_lines()}"

    def last_lines(self) -> str:
        return self.log.read_text(errors="replace")[-LAST_CHARACTERS:]

    def end(self) -> None:
        self.line.close()
        self.process.kill()
        self.process.wait()


class GlooRanks:
    """A group of world_size ranks. Started by the first case, and again by the next one after a failure."""

    def __init__(self, world_size: int, comfyui: Path | None = None) -> None:
        self.world_size = world_size
        self.comfyui = comfyui
        self.ranks: list[Rank] = []
        self._folder: Path | None = None

    def run(self, case: str, /, *, timeout: float = 60.0, **kwargs: object) -> list:
        """The case's result of every rank, in rank order.

        case: "module.function", called as function(rank, world_size, **kwargs). timeout: seconds.
        Raises RanksFailed where a rank raises, dies or does not answer in time.
        """
        if not self.ranks:
            self._start()
        request = pickle.dumps((case, kwargs))
        for rank in self.ranks:
            rank.line.send_bytes(request)
        return self._results(case, timeout)

    def close(self) -> None:
        for rank in self.ranks:
            rank.end()
        self.ranks = []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="gloo_ranks_"))
        arguments = [str(self.world_size), str(self._folder), str(self.comfyui or "")]
        self.ranks = [Rank(number, arguments, self._folder) for number in range(self.world_size)]
        self._results("the start", START_TIMEOUT)

    def _results(self, case: str, timeout: float) -> list:
        answers = self._answers(timeout)
        failures = {number: text for number, (success, text) in answers.items() if not success}
        missing = [number for number in range(self.world_size) if number not in answers]
        failures |= {number: self.ranks[number].where_it_hangs() for number in missing}
        if not failures:
            return [answers[number][1] for number in range(self.world_size)]
        if missing or any(rank.process.poll() is not None for rank in self.ranks):
            self.close()
        raise RanksFailed("\n".join(self._report(case, failures.items())))

    def _answers(self, timeout: float) -> dict[int, tuple[bool, object]]:
        """By rank; without those that did not answer in time, or within GRACE of the first failure."""
        answers: dict[int, tuple[bool, object]] = {}
        waiting = {rank.line: number for number, rank in enumerate(self.ranks)}
        deadline = time.monotonic() + timeout
        while waiting and (ready := wait(list(waiting), max(0.0, deadline - time.monotonic()))):
            for line in ready:
                number = waiting.pop(line)
                answers[number] = self.ranks[number].answer()
                if not answers[number][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        return answers

    def _report(self, case: str, failures: Iterable[tuple[int, object]]) -> Iterable[str]:
        for number, text in sorted(failures):
            yield f"rank {number} of {self.world_size} failed in {case}: {text}"
