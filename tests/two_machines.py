"""A group as a user starts it on two machines, played by two torchrun agents on two addresses of this one."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HOSTS = ("127.0.0.1", "127.0.0.2")


def documented_command(page: Path, **given: str) -> list[str]:
    """The torchrun command of a help page, with the words that stand for something of the user's exchanged."""
    block = next(block for block in page.read_text(encoding="utf-8").split("```")[1::2] if "torchrun" in block)
    words = shlex.split(block[block.index("torchrun") :].replace("\\\n", " "))
    for word, value in given.items():
        assert any(word in found for found in words), f"{word} is not in the command of {page.name}"
        words = [found.replace(word, value) for found in words]
    return words


@contextlib.contextmanager
def two_agents(command: Sequence[str], address: Path, environment: Mapping[str, str], cwd: Path) -> Iterator[Path]:
    """The address of the group once it is there; torchrun on each host with `command`, whose HOST:PORT is filled in.

    The client's machine is the second one, whose rank elastic need not make its first.
    """
    with socket.socket() as probe:
        probe.bind((HOSTS[0], 0))
        endpoint = f"{HOSTS[0]}:{probe.getsockname()[1]}"
    env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"} | dict(environment)
    program, *words = [word.replace("HOST:PORT", endpoint) for word in command]
    assert program == "torchrun"
    agents = []
    for host in HOSTS:
        own = [f"--local-addr={host}", f"--rdzv-conf=is_host={int(host == HOSTS[0])}", "--monitor-interval=0.1"]
        there = [f"--address={address}"] if host == HOSTS[1] else []
        line = [sys.executable, "-m", "torch.distributed.run", *own, *words, *there]
        agents.append(subprocess.Popen(line, env=env, cwd=cwd, stderr=subprocess.DEVNULL))
    try:
        end = time.monotonic() + 120
        while not address.exists():
            assert time.monotonic() < end and all(agent.poll() is None for agent in agents), "the group did not start"
            time.sleep(0.1)
        yield address
    finally:
        for agent in agents:
            agent.terminate()
        for agent in agents:
            agent.wait(40)
