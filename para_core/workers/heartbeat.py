"""Signs of life of a rank: a file of the private folder, touched every BEAT seconds."""

from __future__ import annotations

import threading
import time
from pathlib import Path

BEAT = 0.5


def beat(path: Path) -> None:
    """From now on, in a thread: stops when the process is stopped, or its interpreter hangs."""
    path.touch(mode=0o600)

    def touch() -> None:
        while True:
            time.sleep(BEAT)
            try:
                path.touch(mode=0o600)
            except OSError:
                return  # the folder is gone: so will this process be

    threading.Thread(target=touch, name="para-heartbeat", daemon=True).start()
