"""What a rank's process sets up for itself before it joins the others."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
import time
from pathlib import Path


def settle(log: Path | None) -> None:
    """Ends with its parent, leaves Ctrl-C to it, writes stdout and stderr to log; on SIGUSR1, every stack."""
    threading.Thread(target=_watch, args=(os.getppid(),), name="para-parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if log is not None:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with what it has started
    os._exit(1)
