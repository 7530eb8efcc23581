"""Trains the demo's autoencoder on drawn scenes: python -m para_core.demo.training.autoencoder --out DIR."""

import argparse
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..scene import training_scenes
from ..weights import LATENT_CHANNELS, build_autoencoder, load_autoencoder, save_autoencoder
from .run import Run, write_sheet

SEED = 20240
CROP = 48
LATENT_NOISE = 0.08  # in units of a latent channel's standard deviation

log = logging.getLogger(__name__)


class NormalisedAutoencoder(torch.nn.Module):
    """The autoencoder with a batch norm on its latents, which `fold` merges into the encoder's last convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.autoencoder = start_weights(build_autoencoder())
        self.norm = torch.nn.BatchNorm2d(LATENT_CHANNELS, affine=False, momentum=0.05)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode, disturb and decode images, (B, 3, H, W) in -1..1; return them and the latents' excess variance."""
        latents = self.autoencoder.encoder(images).float()
        self._track(latents.detach())
        latents = F.batch_norm(latents, self.norm.running_mean, self.norm.running_var)
        excess = (latents.var((0, 2, 3)) - 1).square().mean()  # else the encoder outgrows the noise without end
        return self.autoencoder.decoder(latents + LATENT_NOISE * torch.randn_like(latents)), excess

    def _track(self, latents: torch.Tensor) -> None:
        # a batch's own statistics are too noisy: a few backgrounds decide them
        self.norm.running_mean.lerp_(latents.mean((0, 2, 3)), self.norm.momentum)
        self.norm.running_var.lerp_(latents.var((0, 2, 3)), self.norm.momentum)

    @torch.no_grad()
    def calibrate(self, images: torch.Tensor) -> None:
        """Replace the running statistics by those of whole images."""
        latents = torch.cat([self.autoencoder.encoder(part) for part in images.split(64)]).float()
        self.norm.running_mean.copy_(latents.mean((0, 2, 3)))
        self.norm.running_var.copy_(latents.var((0, 2, 3)))

    @torch.no_grad()
    def fold(self) -> torch.nn.Module:
        """Return a plain autoencoder whose encoder gives normalised latents by itself."""
        plain = build_autoencoder()
        plain.load_state_dict(self.autoencoder.state_dict())
        last, scale = plain.encoder.layers[-1], (self.norm.running_var + self.norm.eps).rsqrt()
        last.bias.copy_((last.bias - self.norm.running_mean) * scale)
        last.weight.mul_(scale[:, None, None, None])
        return plain


class ConvolutionMuon(torch.optim.Muon):
    """Muon for convolutions, each kernel taken as a matrix of outputs by inputs; weights are channels last."""

    def __init__(self, weights: list[torch.Tensor], lr: float) -> None:
        self._weights = weights
        matrices = [torch.nn.Parameter(_as_matrix(weight.data)) for weight in weights]
        super().__init__(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")

    def step(self, closure=None) -> None:
        """Update the weights, through matrices that share their memory."""
        for matrix, weight in zip(self.param_groups[0]["params"], self._weights, strict=True):
            matrix.grad = _as_matrix(weight.grad)
        super().step(closure)


def build_optimizers(model: torch.nn.Module, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Return Muon for the kernels and AdamW for the biases."""
    kernels = [parameter for parameter in model.parameters() if parameter.dim() == 4]
    biases = [parameter for parameter in model.parameters() if parameter.dim() == 1]
    return {"muon": ConvolutionMuon(kernels, lr), "adamw": torch.optim.AdamW(biases, lr=lr, weight_decay=0.0)}


def _as_matrix(kernel: torch.Tensor) -> torch.Tensor:
    return kernel.permute(0, 2, 3, 1).flatten(1)


@torch.no_grad()
def start_weights(autoencoder: torch.nn.Module) -> torch.nn.Module:
    """Keep the signal's size through the ReLUs, with every block near the identity."""
    for name, module in autoencoder.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.weight.mul_(0.1 if name.endswith("conv.4") else 1.0)
            if module.bias is not None:
                module.bias.zero_()
    autoencoder.decoder.layers[-1].weight.mul_(0.1)
    autoencoder.decoder.layers[-1].bias.fill_(0.5)
    return autoencoder


def main() -> None:
    """Train from the command line; starts again from the last checkpoint in `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/train/autoencoder"))
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--batch", type=int, default=28)
    parser.add_argument("--lr", type=float, default=6e-4)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    data = draw_images(4000, SEED, min_objects=3)
    model = NormalisedAutoencoder().to(memory_format=torch.channels_last).train()
    optimizers = build_optimizers(model, args.lr)
    run = Run(args.out, {"model": model, **optimizers}, minutes=args.minutes)
    for batch in run.steps(_crops(data, args.batch)):
        with torch.autocast("cpu", torch.bfloat16):
            decoded, excess = model(batch)
        loss = reconstruction_loss(decoded.float(), batch) + 0.05 * excess
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = args.lr * run.schedule(warmup=100, decay_from=0.2)
            optimizer.step()
        run.log(loss)
    finish(model, run)


def finish(model: NormalisedAutoencoder, run: Run) -> None:
    """Calibrate the latents on whole images, fold the norm, and export."""
    model.eval()
    model.calibrate(to_float(draw_images(512, SEED + 3)))
    export(model.fold(), run)


@torch.no_grad()
def export(autoencoder: torch.nn.Module, run: Run) -> None:
    """Write the autoencoder where it ships, and measure what was written on drawings it never saw."""
    save_autoencoder(autoencoder, {"seed": SEED, "steps": run.step})
    shipped, images = load_autoencoder(), to_float(draw_images(128, SEED + 1))
    latents = shipped.encoder(images)
    decoded = shipped.decoder(latents).clamp(-1, 1)
    psnr = -10 * torch.log10(((decoded - images) / 2).square().mean((1, 2, 3))).mean().item()
    log.info("PSNR %.2f dB, latent mean %.3f std %.3f", psnr, latents.mean(), latents.std())
    pairs = torch.cat([images[:8], decoded[:8]]).permute(0, 2, 3, 1)
    write_sheet((pairs + 1) / 2, run.out / "sheet.png")


def reconstruction_loss(decoded: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """L1 of the pixels and of their differences, plus the squared error."""
    across = (decoded.diff(dim=-1) - images.diff(dim=-1)).abs().mean()
    down = (decoded.diff(dim=-2) - images.diff(dim=-2)).abs().mean()
    return F.l1_loss(decoded, images) + 0.5 * (across + down) + 2 * F.mse_loss(decoded, images)


def draw_images(count: int, seed: int, min_objects: int = 1) -> torch.Tensor:
    """Return `count` drawn training scenes, (count, 3, 128, 128) uint8, channels last."""
    rng = random.Random(seed)
    scenes = (scene for scene in training_scenes(seed) if len(scene.objects) >= min_objects)
    arrays = np.stack([np.asarray(next(scenes).draw(rng)) for _ in range(count)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2)


def recolour(images: torch.Tensor) -> torch.Tensor:
    """Give a quarter of the images, (B, 3, H, W) in -1..1, random contrasts and offsets per channel.

    Twelve fixed colours alone are learnt as classes, slowly; a continuum is learnt as a code.
    """
    contrast = torch.rand(len(images), 3, 1, 1) * 2 - 1
    offset = (torch.rand_like(contrast) * 2 - 1) * (1 - contrast.abs())
    return torch.where(torch.rand(len(images), 1, 1, 1) < 0.25, images * contrast + offset, images)


def to_float(images: torch.Tensor) -> torch.Tensor:
    """Return uint8 images as float32 in -1..1."""
    return images.float() / 127.5 - 1


def _crops(data: torch.Tensor, batch: int) -> Iterator[torch.Tensor]:
    while True:
        crops = [_busiest_crop(data[i]) for i in torch.randint(0, len(data), (batch,)).tolist()]
        yield recolour(to_float(torch.stack(crops))).contiguous(memory_format=torch.channels_last)


def _busiest_crop(image: torch.Tensor, candidates: int = 3) -> torch.Tensor:
    # plain background teaches little and covers most of every image
    corners = torch.randint(0, image.shape[-1] - CROP + 1, (candidates, 2)).tolist()
    crops = [image[:, y : y + CROP, x : x + CROP] for y, x in corners]
    return max(crops, key=lambda crop: crop[:, ::4, ::4].float().var().item())


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
