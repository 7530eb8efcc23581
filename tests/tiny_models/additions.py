"""What users put beside the nodes of this pack: a LoRA, a ControlNet."""

from __future__ import annotations

import torch

from .image import FLUX


def add_lora(patcher, strength):
    """A rank-4 LoRA on every linear of the blocks, as the LoRA nodes leave it on a clone."""
    import comfy.weight_adapter

    clone = patcher.clone()
    generator = torch.Generator().manual_seed(3)
    patches = {}
    for name, weight in clone.model.state_dict().items():
        if "block" in name and weight.ndim == 2:
            up = torch.randn(weight.shape[0], 4, generator=generator) * 0.05
            down = torch.randn(4, weight.shape[1], generator=generator) * 0.05
            patches[name] = comfy.weight_adapter.LoRAAdapter(set(), (up, down, None, None, None, None))
    assert len(clone.add_patches(patches, strength)) == len(patches) > 0
    return clone


def flux_control():
    """A ControlNet as the tiny FLUX sees it: fixed residuals for the double and the single blocks."""
    import comfy.controlnet

    _, height, width = FLUX.latent
    shape = (height // 2 * (width // 2), FLUX.unet_config["hidden_size"])

    class FixedControl(comfy.controlnet.ControlBase):
        def get_control(self, x_noisy, t, cond, batched_number, transformer_options):
            residual = torch.randn(x_noisy.shape[0], *shape, generator=torch.Generator().manual_seed(4))
            return {"input": [residual, 0.5 * residual], "output": [residual, None, -0.7 * residual]}

    return FixedControl()
