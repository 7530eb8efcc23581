"""A LoRA for a tiny model, put on as the host's Load LoRA does."""

from __future__ import annotations

import torch

NAMES = ("double_blocks.0.img_attn.qkv", "single_blocks.1.linear2")


def lora(model, strength: float):
    """A clone of a tiny FLUX with changed weights in both stacks."""
    generator = torch.Generator().manual_seed(5)
    state = model.model.state_dict()
    names = [f"diffusion_model.{name}.weight" for name in NAMES]
    patches = {name: (0.1 * torch.randn(state[name].shape, generator=generator),) for name in names}
    clone = model.clone()
    assert len(clone.add_patches(patches, strength)) == len(patches)
    return clone
