"""Sharpens the shipped decoder with the encoder frozen, so that a trained transformer stays valid."""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from ..weights import load_autoencoder
from .autoencoder import LATENT_NOISE, SEED, build_optimizers, draw_images, export, reconstruction_loss, to_float
from .run import Run

CROP = 10  # latents

log = logging.getLogger(__name__)


def main() -> None:
    """Train from the command line; starts again from the last checkpoint in `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/train/decoder"))
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--lr", type=float, default=6e-4)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    autoencoder = load_autoencoder().to(memory_format=torch.channels_last)
    images = draw_images(2000, SEED + 2, min_objects=2)
    latents = encode_images(autoencoder, images)
    decoder = autoencoder.decoder.requires_grad_(True)
    optimizers = build_optimizers(decoder, args.lr)
    run = Run(args.out, {"decoder": decoder, **optimizers}, minutes=args.minutes)
    for part, crop in run.steps(_crops(latents, images, args.batch)):
        with torch.autocast("cpu", torch.bfloat16):
            decoded = decoder(part + LATENT_NOISE * torch.randn_like(part))
        loss = reconstruction_loss(decoded.float(), crop)
        decoder.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = args.lr * run.schedule(warmup=30, decay_from=0.2)
            optimizer.step()
        run.log(loss)
    export(autoencoder, run)


@torch.no_grad()
def encode_images(autoencoder: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the float32 latents of uint8 images."""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.cat([autoencoder.encoder(to_float(part)).float() for part in images.split(50)])


def _crops(latents: torch.Tensor, images: torch.Tensor, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    while True:
        pairs = [_busiest_crop(latents[i], images[i]) for i in torch.randint(0, len(latents), (batch,)).tolist()]
        parts, crops = (torch.stack(items) for items in zip(*pairs, strict=True))
        yield parts, to_float(crops).contiguous(memory_format=torch.channels_last)


def _busiest_crop(latent: torch.Tensor, image: torch.Tensor, candidates: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    corners = torch.randint(0, latent.shape[-1] - CROP + 1, (candidates, 2)).tolist()
    pairs = [
        (latent[:, y : y + CROP, x : x + CROP], image[:, y * 8 : (y + CROP) * 8, x * 8 : (x + CROP) * 8])
        for y, x in corners
    ]
    return max(pairs, key=lambda pair: pair[1][:, ::4, ::4].float().var().item())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
