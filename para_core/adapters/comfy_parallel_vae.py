"""ComfyUI: decodes a latent on a group of ranks, everything around the VAE's model being the host's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor, nn

from ..parallel_config import ParallelConfig
from ..parallel_notice import ParallelNotice
from ..parallel_vae import obstacle
from .comfy_session import Session
from .comfy_unload import unload


class DecoderStandIn(nn.Module):
    """Stands in for the model of a VAE: `decode` runs elsewhere, and the rest is the original's."""

    comfy_has_chunked_io = False  # results come back whole

    def __init__(self, original: nn.Module, decode_elsewhere: Callable[[Tensor, dict], Tensor]) -> None:
        super().__init__()
        self._elsewhere = (original, decode_elsewhere)  # in a tuple: its weights are not ours

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._elsewhere[0], name)

    def decode(self, samples: Tensor, **options) -> Tensor:
        return self._elsewhere[1](samples, options)


def parallel_vae_decode(
    vae: VAE,
    samples: Tensor,
    config: ParallelConfig,
    session: Callable[[ParallelConfig], Session],
    *,
    listener: Callable[[ParallelNotice], None] | None = None,
) -> Tensor:
    """What `vae.decode(samples)` gives, computed by the devices of `config`; neither is changed.

    samples: the latent, (B, C, H, W) or (B, C, T, H, W). listener: told in the end how many ranks it took.
    Raises ValueError for a VAE that is not exact on slices.
    """
    vae.throw_exception_if_invalid()
    model = vae.first_stage_model
    weight = next(model.parameters())
    latent = samples[:, :, 0] if vae.latent_dim == 2 and samples.ndim == 5 else samples
    num_ranks = len(config.devices) or 2
    if (found := obstacle(model.decode, latent.to(weight.device, vae.vae_dtype), num_ranks=num_ranks)) is not None:
        raise ValueError(
            f"this VAE ({type(model).__name__}) cannot be decoded on several devices: {found}. Use VAE Decode."
        )
    group = session(config)
    unload(vae.patcher)
    names = group.prepared.vae(model)
    images = _twin(vae, lambda part, options: group.decode(names, part, options)).decode(samples)
    if listener is not None:
        listener(ParallelNotice("decoded", group.world_size))
    return images


def _twin(vae: VAE, decode_elsewhere: Callable[[Tensor, dict], Tensor]) -> VAE:
    """A VAE that treats latents and images as `vae` does, and has no weights."""
    twin = copy.copy(vae)
    twin.first_stage_model = DecoderStandIn(vae.first_stage_model, decode_elsewhere)
    twin.patcher = ModelPatcher(
        twin.first_stage_model, load_device=vae.device, offload_device=vae.patcher.offload_device
    )
    return twin
