"""diffusers: a VAE whose decode is shared out over the ranks of a script that torchrun started."""

from __future__ import annotations

import functools
import inspect
from typing import TypeVar

import torch.distributed as dist
from diffusers import ModelMixin
from torch.distributed.device_mesh import DeviceMesh

from ..parallel_vae import parallel_decode

VAE = TypeVar("VAE", bound=ModelMixin)


def parallelize_vae(vae: VAE, *, mesh: DeviceMesh | None = None) -> VAE:
    """Make every later decode of this VAE object run on all ranks of a mesh, exactly, and return it.

    Every rank calls decode with the same latent and gets the whole picture, without gradients. mesh: of one dim; None:
    all ranks. Applying again replaces the mesh; other VAEs of the class are untouched, and `del vae.decode` undoes it.

    Raises:
        ValueError: for a model without decode, without a process group, and for a mesh of several dims. decode raises
            it for a VAE that is not exact on slices, see CannotSplit, and while tiling is enabled.
    """
    if not callable(getattr(vae, "decode", None)):
        raise ValueError(f"{type(vae).__name__} has no decode; parallelize_vae takes a VAE, as pipe.vae.")
    if not dist.is_initialized():
        raise ValueError(
            "there is no process group to decode with; needed is one rank per device. "
            "Start the script with torchrun and call torch.distributed.init_process_group first."
        )
    group = _group(mesh)
    base = getattr(vae.decode, "para_base", vae.decode)
    first = next(iter(inspect.signature(base).parameters))

    @functools.wraps(base)
    def decode(*args, **kwargs):
        if getattr(vae, "use_tiling", False):
            raise ValueError(
                f"{type(vae).__name__} has tiling enabled, which blends tiles; slices over ranks are exact and need "
                "less memory each. Call disable_tiling() on it."
            )
        z, rest = (args[0], args[1:]) if args else (kwargs.pop(first), ())
        return parallel_decode(lambda own: base(own, *rest, **kwargs), z, group=group)

    decode.para_base = base
    vae.decode = decode
    return vae


def _group(mesh: DeviceMesh | None) -> dist.ProcessGroup | None:
    if mesh is None or mesh.size() == dist.get_world_size():
        return None
    if mesh.ndim > 1:
        raise ValueError(
            f"the mesh has the dims {mesh.mesh_dim_names} and covers {mesh.size()} of {dist.get_world_size()} ranks; "
            "a VAE is split along one dim, choose it as in mesh['ulysses']."
        )
    return mesh.get_group()
