"""Trains the demo's FLUX transformer on latents of drawn scenes: python -m para_core.demo.training.transformer."""

import argparse
import copy
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from ..prompt import encode, encode_scene
from ..sampling import pack, predict
from ..scene import MAX_OBJECTS, held_out_prompts, training_scenes
from ..weights import build_transformer, load_autoencoder, save_transformer
from .autoencoder import to_float
from .evaluation import measure, sample_pictures
from .run import Run, write_sheet

SEED = 20241
NULL_SHARE = 0.1  # of the batches: the unconditional model of classifier-free guidance
EMA_DECAY = 0.999

log = logging.getLogger(__name__)

Latents = dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]  # num_objects: latents, context, pooled


def main() -> None:
    """Train from the command line; starts again from the last checkpoint in `--out`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/train/transformer"))
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--scenes", type=int, default=16000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--eval-every", type=float, default=10.0, help="minutes")
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(2)
    args.out.mkdir(parents=True, exist_ok=True)
    data = load_latents(args.out / "latents.pt", args.scenes)
    train(data, args)


def train(data: Latents, args: argparse.Namespace) -> None:
    """Fit the transformer and its moving average to the latents, exporting the average at every evaluation."""
    model = start_weights(build_transformer())
    model.x_embedder.register_forward_hook(_to_float)
    ema = copy.deepcopy(model).requires_grad_(False).eval()
    optimizers = build_optimizers(model, args.lr)
    run = Run(args.out, {"model": model, "ema": ema, **optimizers}, minutes=args.minutes)
    evaluated = run.spent
    for latents, context, pooled in run.steps(batches(data, args.batch, SEED + run.step)):
        loss = flow_loss(model, latents, context, pooled)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.param_groups[0]["lr"] = args.lr * run.schedule(warmup=100, decay_from=0.75)
            optimizer.step()
        decay = min(EMA_DECAY, (run.step + 1) / (run.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        run.log(loss, every=50)
        if run.spent - evaluated > args.eval_every * 60:
            evaluated = run.spent
            export(ema, run)
    export(ema, run)


def build_optimizers(model: torch.nn.Module, lr: float) -> dict[str, torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices, and AdamW at the same rate for the rest."""
    muon, adamw = [], []
    for name, parameter in model.named_parameters():
        is_block_matrix = "transformer_blocks" in name and parameter.dim() == 2 and "norm" not in name
        (muon if is_block_matrix else adamw).append(parameter)
    return {
        "muon": torch.optim.Muon(muon, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        "adamw": torch.optim.AdamW(adamw, lr=lr, betas=(0.9, 0.99), weight_decay=0.01),
    }


def flow_loss(model: torch.nn.Module, latents: torch.Tensor, context: torch.Tensor, pooled: torch.Tensor):
    """Return the rectified flow loss: the model gives noise - data at (1 - sigma) data + sigma noise."""
    logit_normal, uniform = torch.sigmoid(torch.randn(len(latents))), torch.rand(len(latents))
    sigma = torch.where(torch.rand(len(latents)) < 0.7, logit_normal, uniform)
    noise = torch.randn_like(latents)
    noisy = torch.lerp(latents, noise, sigma[:, None, None])
    with torch.autocast("cpu", torch.bfloat16):
        velocity = predict(model, noisy, sigma, context, pooled)
    return F.mse_loss(velocity.float(), noise - latents)


@torch.no_grad()
def start_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Zero the modulations and the last layer, so that every block starts as the identity."""
    for name, parameter in model.named_parameters():
        if "norm" in name and ".linear." in name or name.startswith("proj_out"):
            parameter.zero_()
    return model


def export(ema: torch.nn.Module, run: Run) -> None:
    """Write the moving average where it ships, and log how it does on held-out prompts."""
    save_transformer(ema, {"seed": SEED, "steps": run.step, "minutes": f"{run.spent / 60:.0f}"})
    prompts = held_out_prompts(24, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        pictures = sample_pictures(ema, load_autoencoder(), prompts, seed=0)
    write_sheet(pictures, run.out / f"sheet_{run.step:06d}.png")
    log.info("step %d: attribute accuracy %.3f of %d prompts", run.step, measure(prompts, pictures), len(prompts))


def load_latents(path: Path, count: int) -> Latents:
    """Read the encoded training scenes, or draw and encode `count` of them and keep them in `path`."""
    if not path.is_file():
        torch.save(encode_scenes(count), path)
    return torch.load(path, weights_only=True)


@torch.no_grad()
def encode_scenes(count: int) -> Latents:
    """Draw and encode scenes, grouped by their number of objects; latents are (N, 64 tokens, 64) bfloat16."""
    autoencoder = load_autoencoder().to(memory_format=torch.channels_last)
    rng, scenes = random.Random(SEED), training_scenes(SEED)
    groups = {num_objects: ([], [], []) for num_objects in range(1, MAX_OBJECTS + 1)}
    for start in range(0, count, 64):
        part = [next(scenes) for _ in range(64)]
        images = torch.from_numpy(np.stack([np.asarray(scene.draw(rng)) for scene in part])).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            latents = pack(autoencoder.encoder(to_float(images)))
        for scene, latent in zip(part, latents, strict=True):
            for values, value in zip(groups[len(scene.objects)], (latent, *encode_scene(scene)), strict=True):
                values.append(value)
        if start % 6400 == 0:
            log.info("encoded %d of %d scenes", start, count)
    return {
        num_objects: (torch.stack(latents).bfloat16(), torch.cat(contexts), torch.cat(pooled))
        for num_objects, (latents, contexts, pooled) in groups.items()
    }


def batches(data: Latents, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield batches of one number of tokens each, now and then with the empty prompt instead."""
    rng = random.Random(seed)
    null_context, null_pooled = encode("")
    while True:
        latents, context, pooled = data[rng.choice(list(data))]
        picks = torch.tensor(rng.sample(range(len(latents)), size))
        if rng.random() < NULL_SHARE:
            yield latents[picks].float(), null_context.expand(size, -1, -1), null_pooled.expand(size, -1)
        else:
            yield latents[picks].float(), context[picks], pooled[picks]


def _to_float(module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
    # keeps the residual stream float32; diffusers also rounds the timestep to this dtype
    return output.float()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    main()
