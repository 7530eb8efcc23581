"""What a rank's process sets up for itself before it joins the others."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import threading
import time


def settle() -> None:
    """Ends with its parent, leaves Ctrl-C to it, writes every thread's stack on SIGUSR1, and opens as many files as
    this user may: strangers can take some while the ranks connect (ports.py).
    """
    import resource  # Windows has none

    with contextlib.suppress(OSError, ValueError):  # a system may allow less than it says
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.environ["TORCH_GLOO_LAZY_INIT"] = "0"  # ranks connect when a group is made, and not after
    threading.Thread(target=_watch, args=(os.getppid(),), name="para-parent", daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)  # with what it has started
    os._exit(1)
