"""python -m tests.benchmarks.parallel_vae: an AutoencoderKL decode on two one-thread ranks against one.

CPU seconds of the slowest rank and wall seconds, medians of paired runs. Beside them the machine's own ceiling: two
independent whole decodes at once, which share its memory and caches as two ranks do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

from para_core.demo.host import HOW_TO_GET_ONE, find_comfyui

CASE = "benchmarks.parallel_vae.decode_seconds"


def main() -> None:
    from ..gloo_ranks import GlooRanks

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--channels", type=int, default=64, help="of the widest level; SD's VAE has 128")
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--ranks", type=int, default=2)
    args = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        sys.exit(HOW_TO_GET_ONE)
    single, group = GlooRanks(1, comfyui), GlooRanks(args.ranks, comfyui)
    settings = {"channels": args.channels, "latent": args.pixels // 8, "timeout": 1200.0}
    rows: dict[str, list[tuple[float, float]]] = {"one": [], "ceiling": [], "split": []}
    try:
        for number in range(args.pairs + 1):
            for name, ranks in (("one", single), ("ceiling", group), ("split", group)):
                seconds = ranks.run(CASE, split=name == "split", **settings)
                if number:  # the first round warms up
                    rows[name].append(tuple(map(max, zip(*seconds, strict=True))))
    finally:
        single.close()
        group.close()
    report(rows, args.ranks)


def report(rows: dict[str, list[tuple[float, float]]], num_ranks: int) -> None:
    for index, unit in enumerate(("CPU seconds", "wall seconds")):
        one, ceiling, split = ([seconds[index] for seconds in rows[name]] for name in ("one", "ceiling", "split"))
        speedup = statistics.median(a / b for a, b in zip(one, split, strict=True))
        most = statistics.median(num_ranks * a / b for a, b in zip(one, ceiling, strict=True))
        sys.stdout.write(
            f"{unit}: one rank {statistics.median(one):.2f}, {num_ranks} ranks {statistics.median(split):.2f}, "
            f"speedup {speedup:.2f} (this machine's ceiling {most:.2f}; {len(one)} pairs)\n"
        )


def decode_seconds(rank: int, world_size: int, *, channels: int, latent: int, split: bool) -> tuple[float, float]:
    """CPU and wall seconds of one decode on this rank: of its slice, or of the whole by itself."""
    import torch
    import torch.distributed as dist

    from para_core.parallel_vae import parallel_decode

    vae, z = _vae(channels), torch.randn((1, 4, latent, latent), generator=torch.Generator().manual_seed(0))
    dist.barrier()
    start, cpu = time.perf_counter(), time.process_time()
    parallel_decode(vae.decode, z, destination=0) if split else vae.decode(z)
    return time.process_time() - cpu, time.perf_counter() - start


def _vae(channels: int):
    """The autoencoder of SD with its own depth."""
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL

    config = {"double_z": True, "z_channels": 4, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": channels}
    config |= {"ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "attn_resolutions": [], "dropout": 0.0}
    vae = AutoencoderKL(ddconfig=config, embed_dim=4).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(noise / parameter[0].numel() ** 0.5 if parameter.ndim > 1 else noise)
    return vae


if __name__ == "__main__":
    main()
