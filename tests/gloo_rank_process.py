"""One rank of tests/gloo_ranks.py: python gloo_rank_process.py FD RANK WORLD_SIZE FOLDER COMFYUI.

Cases come in over the socket FD and answers go back. The process ends when the other end of that socket is closed,
whatever a case is doing: with the group, or with the test process however that dies.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

# At the end, as conftest.py does: `nodes` and `server` must stay ComfyUI's. The front is this folder, tests/.
sys.path.append(str(Path(__file__).absolute().parent.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

COLLECTIVE_TIMEOUT = timedelta(seconds=300)  # more than any case's own, which says more


def read_requests(line: Connection, requests: queue.SimpleQueue) -> None:
    """Runs in a thread of its own, since a collective that hangs keeps the main one."""
    while True:
        try:
            requests.put(line.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)


def answer_to(request: bytes, rank: int, world_size: int) -> bytes:
    try:
        case, kwargs = pickle.loads(request)
        module, _, name = case.rpartition(".")
        function = getattr(importlib.import_module(module), name)
        torch.manual_seed(0)
        with torch.inference_mode():
            return pickle.dumps((True, function(rank, world_size, **kwargs)))
    except Exception:
        return pickle.dumps((False, traceback.format_exc()))


def main(descriptor: str, rank: str, world_size: str, folder: str, comfyui: str) -> None:
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)
    line = Connection(int(descriptor))
    requests: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=read_requests, args=(line, requests), daemon=True).start()
    if comfyui:
        from fixtures_host import boot_comfyui

        boot_comfyui(Path(comfyui), Path(folder, f"comfyui{rank}"))
    torch.set_num_threads(1)
    store = f"file://{folder}/rendezvous"
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=int(world_size), timeout=COLLECTIVE_TIMEOUT
    )
    line.send_bytes(pickle.dumps((True, None)))
    while True:
        line.send_bytes(answer_to(requests.get(), int(rank), int(world_size)))


if __name__ == "__main__":
    main(*sys.argv[1:])
