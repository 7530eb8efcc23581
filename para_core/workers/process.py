"""What a rank's process sets up for itself before anything else."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from pathlib import Path

PR_SET_PDEATHSIG = 1


def settle(log: Path | None) -> None:
    """Dies with its parent, leaves Ctrl-C to it, writes stdout and stderr to log; on SIGUSR1, every stack."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)


def die_with_parent() -> None:
    parent = os.getppid()
    if sys.platform == "linux":
        # Reaches a stopped or hanging process too.
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    threading.Thread(target=_watch, args=(parent,), name="para-parent", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os.killpg(0, signal.SIGKILL) if os.getpgrp() == os.getpid() else os._exit(1)
