"""What the agent starts for each rank: python rank_process.py AGENT_PID DIRECTORY.

A script, so that the kernel is told to end it with the agent before it imports torch, which takes seconds.
"""

import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Also when this process is stopped or hangs. Elsewhere than on Linux the thread of process.py watches."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its modules are no top-level ones
    die_with(int(sys.argv.pop(1)))
    runpy.run_module("para_core.workers.rank", run_name="__main__", alter_sys=True)
