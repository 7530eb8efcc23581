"""ComfyUI on a rank: memory that it no longer needs goes back to the device and to the system."""

from __future__ import annotations

import ctypes
import sys

import comfy.model_management


def give_back() -> None:
    """What the allocators keep for later: the server and the other ranks may need it before this one does.

    glibc keeps freed memory (weights as float32, LoRAs while they are merged) in the process, for every rank again.
    """
    comfy.model_management.soft_empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # musl has none
    if trim is not None:
        trim(0)
