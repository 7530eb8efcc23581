"""ComfyUI: decodes a latent on a group of ranks, everything around the VAE's model being the host's own."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from torch import Tensor, nn

from ..parallel_config import ParallelConfig
from ..parallel_notice import ParallelNotice
from ..parallel_vae import obstacle
from ..workers import WorkerError
from .comfy_bare_modules import is_dynamic
from .comfy_session import Session
from .comfy_travel import pack_module, unpack
from .comfy_unload import unload

logger = logging.getLogger(__name__)


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


class RemoteDecoder:
    """Decodes parts of a latent on the group's ranks. in_tiles: they ran out of memory, and the host makes tiles.

    vae: the host's; its estimate of the memory that decoding needs is shared out among the ranks.
    """

    def __init__(self, vae: VAE, group: Session) -> None:
        self._group, self._estimate, self._dtype = group, vae.memory_used_decode, vae.vae_dtype
        self._names = group.prepare_vae(vae.patcher) | {"whole": vae.disable_offload}
        self._host_tiles = not getattr(vae, "handles_tiling", False)  # others' models make tiles, where no rank is
        self.in_tiles = False

    def memory(self, shape: Sequence[int], dtype: torch.dtype) -> float:
        """Of one rank for a latent of this shape, in bytes."""
        return self._estimate(shape, dtype) / self._group.world_size

    def __call__(self, samples: Tensor, options: dict) -> Tensor:
        """The decoded part. Raises what tells the host to decode in tiles where a rank runs out of memory."""
        names = self._names | {"memory": self.memory(samples.shape, self._dtype)}
        try:
            return self._group.decode(names, samples, options)
        except WorkerError as error:
            cause = str(error).partition("\n")[0]
            if self.in_tiles or not self._host_tiles or "out of memory" not in cause.lower():
                raise
            logger.warning("Parallel VAE Decode: %s", cause)
            self.in_tiles = True
            raise comfy.model_management.OOM_EXCEPTION(cause) from error


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
    Where a rank runs out of memory, the host decodes in tiles, as it does on one device; the ranks decode those.
    Raises ValueError for a VAE that is not exact on slices.
    """
    vae.throw_exception_if_invalid()
    unload(vae.patcher)
    _refuse(vae, samples, num_ranks=len(config.devices) or 2)
    group = session(config)
    decoder = RemoteDecoder(vae, group)
    images = _twin(vae, decoder).decode(samples)
    if listener is not None:
        kind = "decoded_in_tiles" if decoder.in_tiles else "decoded"
        listener(ParallelNotice(kind, group.world_size, replaced=group.replaced))
    return images


def _refuse(vae: VAE, samples: Tensor, *, num_ranks: int) -> None:
    """Raise ValueError for a VAE that the ranks could not decode with as the host does."""
    model = unpack(*pack_module(vae.first_stage_model, dynamic=is_dynamic(vae.patcher)))  # what they will have
    device = next(model.parameters()).device
    latent = samples[:, :, 0] if vae.latent_dim == 2 and samples.ndim == 5 else samples
    if (found := obstacle(model.decode, latent.to(device, vae.vae_dtype), num_ranks=num_ranks)) is not None:
        raise ValueError(
            f"this VAE ({type(model).__name__}) cannot be decoded on several devices: {found}. Use VAE Decode."
        )


def _twin(vae: VAE, decoder: RemoteDecoder) -> VAE:
    """A VAE that treats latents and images as `vae` does, and has no weights."""
    twin = copy.copy(vae)
    twin.memory_used_decode = decoder.memory
    twin.first_stage_model = DecoderStandIn(vae.first_stage_model, decoder)
    twin.patcher = ModelPatcher(
        twin.first_stage_model, load_device=vae.device, offload_device=vae.patcher.offload_device
    )
    return twin
