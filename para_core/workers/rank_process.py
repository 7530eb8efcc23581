"""What the agent starts for each rank: python rank_process.py AGENT_PID DIRECTORY.

A script of the standard library: importing torch takes seconds, and before that the kernel must know to end this
process with the agent, the agent which process this is, and what goes wrong must have a log to go to.
"""

import ctypes
import json
import os
import runpy
import signal
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
BEAT = 0.5  # seconds between two signs of life


def die_with(parent: int) -> None:
    """Also when this process is stopped or hangs."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def write_to(log: str) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def announce(path: str) -> None:
    with open(f"{path}.new", "w") as file:
        json.dump({"pid": os.getpid()}, file)
    os.replace(f"{path}.new", path)


def beat(path: str) -> None:
    """Touches a file that the agent has an eye on: not while the process is stopped, or its interpreter hangs."""
    with open(path, "w"):
        pass
    while True:
        time.sleep(BEAT)
        try:
            os.utime(path)
        except OSError:
            return  # the folder is gone: so will this process be


def main(agent: str, directory: str) -> None:
    sys.path.pop(0)  # this folder: its modules are no top-level ones
    die_with(int(agent))
    files = os.path.join(directory, f"rank{os.environ['RANK']}")
    write_to(f"{files}.log")
    threading.Thread(target=beat, args=(f"{files}.beat",), name="para-heartbeat", daemon=True).start()
    announce(f"{files}.json")
    sys.argv = [sys.argv[0], directory]
    runpy.run_module("para_core.workers.rank", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
