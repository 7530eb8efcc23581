"""What the ranks of test_diffusers_parallel_vae.py run."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import init_device_mesh

from para_core.adapters.diffusers_parallel_vae import parallelize_vae
from para_core.demo.weights import load_autoencoder


def build(title: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A VAE and a latent of it, nine wide."""
    import diffusers

    generator = torch.Generator().manual_seed(1)
    if title == "demo":
        return load_autoencoder(), torch.randn(2, 16, 6, 9, generator=generator)
    if title == "AutoencoderTiny":
        return diffusers.AutoencoderTiny().eval(), torch.randn(1, 4, 6, 9, generator=generator)
    if title == "AutoencoderKLWan":
        vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
        return vae.eval(), torch.randn(1, 4, 3, 6, 9, generator=generator)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64),
        norm_num_groups=8,
    )
    return vae.eval(), torch.randn(2, 4, 6, 9, generator=generator)


def decode(rank: int, world_size: int, *, title: str) -> tuple[float, str, list[int]]:
    """(relative error, class of the result, widths of the latent that the decoder saw: whole, then own slice)."""
    vae, z = build(title)
    seen: list[int] = []
    first = next(module for module in vae.decoder.modules() if isinstance(module, (torch.nn.Conv2d, torch.nn.Conv3d)))
    first.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-1]))
    expected = vae.decode(z).sample
    whole = len(seen)
    found = parallelize_vae(vae).decode(z)
    del seen[1:whole], seen[2:]
    return float((found.sample - expected).norm() / expected.norm()), type(found).__name__, seen


def other_objects(rank: int, world_size: int) -> tuple[bool, bool, bool]:
    """(another object is untouched, applied twice it is applied once, undone it is as before)."""
    (vae, z), (other, _) = build("AutoencoderKL"), build("AutoencoderKL")
    once = parallelize_vae(vae).decode
    again = parallelize_vae(vae).decode
    (picture,) = vae.decode(z, return_dict=False)
    del vae.decode
    same = torch.allclose(picture, vae.decode(z=z).sample, atol=1e-4)
    return "decode" not in vars(other), once.para_base == again.para_base, same and "decode" not in vars(vae)


def meshes(rank: int, world_size: int) -> tuple[float, str]:
    """(error of ranks that decode different latents, each alone; what a part of a mesh of several dims is told)."""
    vae, z = build("AutoencoderKL")
    mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("batch", "ring", "ulysses"))
    z = z + rank
    expected = vae.decode(z).sample
    found = parallelize_vae(vae, mesh=mesh["ulysses"]).decode(z=z).sample
    try:
        parallelize_vae(vae, mesh=mesh["ring", "ulysses"])
        message = ""
    except ValueError as error:
        message = str(error)
    return float((found - expected).norm() / expected.norm()), message


def tiled(rank: int, world_size: int) -> str:
    vae, z = build("AutoencoderKL")
    vae.enable_tiling()
    try:
        parallelize_vae(vae).decode(z)
        return ""
    except ValueError as error:
        return str(error)
