"""ComfyUI: the attention that the user has chosen on its command line, and the host's function for it."""

from __future__ import annotations

import comfy.ldm.modules.attention
from comfy.cli_args import args
from torch import Tensor


def chosen_attention() -> str:
    """By its name among the host's functions; "pytorch" where the user has left the choice to the host.

    Those of `attention.BACKENDS` are called as there.
    """
    name = comfy.ldm.modules.attention.optimized_attention.__name__.removeprefix("attention_")
    # What the host falls back to on a device for which it knows nothing better, such as the CPU.
    return "pytorch" if name == "sub_quad" and not args.use_quad_cross_attention else name


def host_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **options) -> Tensor:
    """What the host's models call, for q, k, v of (B, H, S, D). options: scale, enable_gqa."""
    given = {name: value for name, value in options.items() if value}
    attention = comfy.ldm.modules.attention.optimized_attention
    return attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True, skip_output_reshape=True, **given)
