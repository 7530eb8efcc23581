"""A model whose weights are changed where the host uses them outside of the forward."""

import torch
from tiny_models import sample


def run(model, tiny, *, cfg=4.0, **settings):
    """As the host runs a prompt: Anima prepares its text once only so."""
    with torch.inference_mode():
        return sample(model, tiny, cfg=cfg, **{"steps": 1, **settings})


def on(layer, model, value=None):
    """A clone of the model with another weight in this layer, as LoRAs make it."""
    key, clone = f"diffusion_model.{layer}.weight", model.clone()
    shape = model.model.state_dict()[key].shape
    value = 0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(5)) if value is None else value
    assert clone.add_patches({key: (value,)}) == [key]
    return clone
