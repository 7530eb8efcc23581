"""Decodes one latent on all ranks of a process group, and says beforehand whether that is exact."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

from .ranks import MIN_UNITS, Ranks, RehearsedRanks
from .rows import Rows
from .split_call import CannotSplit
from .split_mode import SplitMode

logger = logging.getLogger(__name__)

Decoded = TypeVar("Decoded")
Decode = Callable[[Tensor], Decoded]
MAX_REHEARSED_FRAMES = 4  # with the third chunk of frames a causal decoder is in its steady state


def parallel_decode(
    decode: Decode,
    z: Tensor,
    *,
    group: dist.ProcessGroup | None = None,
    dim: int | None = None,
    destination: int | None = None,
) -> Decoded:
    """Return decode(z), computed slice by slice on the ranks of a group: exact, not blended tiles.

    Every rank calls it with the same decoder and the same whole latent, (B, C, ..., H, W). decode runs as it is, on a
    slice along dim (None: the longer of the last two); every operator that mixes rows is completed by the other
    ranks', see SplitMode. Every rank gets the whole result; where a destination (a rank of the group) is given, only
    that one does, and the others get their slice of it. Gradients are not computed.

    One rank, or fewer than two latent rows for each: every rank decodes all of it.

    Raises:
        CannotSplit: a ValueError that names the module which is not exact on slices; `obstacle` finds it beforehand.
    """
    num_ranks = dist.get_world_size(group) if dist.is_initialized() else 1
    dim = _split_dim(z, dim)
    if z.shape[dim] < MIN_UNITS * num_ranks or num_ranks == 1:
        if num_ranks > 1:
            logger.warning("%d latent rows are too few for %d ranks: each decodes all", z.shape[dim], num_ranks)
        with torch.no_grad():
            return decode(z)
    ranks = Ranks(group, z.device, z.shape[dim])
    return _decode(decode, z, dim, ranks, destination)


def obstacle(decode: Decode, z: Tensor, *, num_ranks: int = 2, dim: int | None = None) -> str | None:
    """Return why a decoder cannot be split exactly over so many ranks; None where it can.

    Runs decode in one process on fake tensors of z's shape, dtype and device: nothing is computed or allocated.
    """
    dim = _split_dim(z, dim)
    if num_ranks == 1 or z.shape[dim] < MIN_UNITS * num_ranks:
        return None
    if z.ndim == 5:
        z = z[:, :, :MAX_REHEARSED_FRAMES]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            _decode(decode, fake.from_tensor(z[:1]), dim, RehearsedRanks(num_ranks, z.device, z.shape[dim]), None)
    except CannotSplit as error:
        return str(error)
    except RuntimeError as error:  # torch's: sizes that do not fit on a slice, or values that decide what is computed
        return f"the decoder does not run on a slice of the latent ({error}): decode this VAE on one device"
    return None


def check_supported(decode: Decode, z: Tensor, *, num_ranks: int = 2, dim: int | None = None) -> None:
    """Raise CannotSplit, a ValueError, where `obstacle` finds one."""
    if found := obstacle(decode, z, num_ranks=num_ranks, dim=dim):
        raise CannotSplit(found)


def _split_dim(z: Tensor, dim: int | None) -> int:
    """Return the dim to split, counted from the left."""
    if dim is None:
        dim = -1 if z.shape[-1] > z.shape[-2] else -2
    if dim % z.ndim < 2:
        raise ValueError(f"dim {dim} of a latent of shape {tuple(z.shape)} is batch or channels; split a spatial dim")
    return dim % z.ndim


def _decode(decode: Decode, z: Tensor, dim: int, ranks: Ranks, destination: int | None) -> Decoded:
    mode = SplitMode(ranks)
    # A compiled decoder runs as written: its graph was traced without the mode.
    with torch.compiler.set_stance("force_eager"), torch.inference_mode():
        # In inference mode the operators arrive whole: of attention, not the products it is made of.
        own = mode.enter(z, dim)
        with mode:
            decoded = decode(own)
    with torch.no_grad():
        return tree_map_only(Tensor, lambda out: _whole(mode, out, destination), decoded)


def _whole(mode: SplitMode, out: Tensor, destination: int | None) -> Tensor:
    rows = mode.entry_of(out)
    if not isinstance(rows, Rows):
        return out
    if rows.extended or rows.outer != 1:
        raise CannotSplit(f"the decoder's output of shape {tuple(out.shape)} does not keep its rows in one dim")
    return mode.ranks.gather(out, rows.dim, rows.inner, destination)
