"""ComfyUI on a rank: with which command line it runs; imports nothing of ComfyUI, which reads it when imported."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def rank_arguments(arguments: Mapping[str, object], device: torch.device) -> dict[str, object]:
    """The server's command line for a rank on this device.

    Without what keeps models there: a rank has nothing but the ones that the server asks for, until it asks otherwise.
    """
    return {**arguments, "cpu": device.type == "cpu", "highvram": False, "gpu_only": False}
