"""One way to sample a tiny model through ComfyUI's real sampler, and to compare what comes out."""

from __future__ import annotations

import math

import torch

from .tiny_model import TinyModel, conditioning

ALWAYS = 100.0  # a threshold: random weights change far more from step to step than trained ones do
NEVER = 1e-30  # a threshold: every block goes through the cache and nothing is reused; at 0 no block does


def fbcache(patcher, residual_diff_threshold, listener=None, **config):
    """The patcher with the first-block cache; config as in CacheConfig."""
    from para_core.adapters.comfy_fbcache import apply_fbcache
    from para_core.residual_cache import CacheConfig

    return apply_fbcache(patcher, CacheConfig(residual_diff_threshold, **config), listener=listener)


def latent_of(tiny: TinyModel, latent: tuple | None, batch: int, fill) -> torch.Tensor:
    """fill(shape) for each part, nested where the model's latent is."""
    shapes = tiny.parts if latent is None else (latent,)
    tensors = [fill((batch, *shape)) for shape in shapes]
    if len(tensors) == 1:
        return tensors[0]
    import comfy.nested_tensor

    return comfy.nested_tensor.NestedTensor(tensors)


def noise_of(tiny: TinyModel, latent: tuple | None, batch: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return latent_of(tiny, latent, batch, lambda shape: torch.randn(shape, generator=generator))


def sample(
    patcher,
    tiny: TinyModel,
    *,
    steps: int = 6,
    cfg: float = 1.0,
    seed: int = 0,
    sampler: str = "euler",
    num_tokens: tuple[int, int] = (7, 5),
    latent: tuple[int, ...] | None = None,
    batch: int = 1,
    denoise: float = 1.0,
    positive: list | None = None,
    negative: list | None = None,
    noise_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The final latent, (batch, *latent), through ComfyUI's KSampler. num_tokens: of the positive, the negative.

    Of a nested latent all parts, flattened and joined: (batch, 1, n).
    """
    import comfy.sample

    output = comfy.sample.sample(
        patcher,
        noise_of(tiny, latent, batch, seed),
        steps,
        cfg,
        sampler,
        "simple",
        positive or conditioning(tiny, 1, num_tokens[0]),
        negative or conditioning(tiny, 2, num_tokens[1]),
        latent_of(tiny, latent, batch, torch.zeros),
        denoise=denoise,
        noise_mask=noise_mask,
        disable_pbar=True,
        seed=seed,
    )
    if not getattr(output, "is_nested", False):
        return output
    return torch.cat([part.reshape(part.shape[0], 1, -1) for part in output.unbind()], -1)


def with_sampler(
    patcher,
    tiny: TinyModel,
    function,
    *,
    cfg: float = 1.0,
    num_tokens: tuple[int, int] = (7, 5),
    batch: int = 1,
    positive: list | None = None,
    negative: list | None = None,
    noise_mask: torch.Tensor | None = None,
    denoise: float = 1.0,
) -> None:
    """Run `function(model, x, sigmas, **extra_args)` as the sampler of a 4-step run, inside ComfyUI's own guider.

    Within it `model(x, sigma)` is a guided model call, as samplers make it. denoise: below 1 an image is given, and the
    schedule starts at this sigma.
    """
    import comfy.sample
    import comfy.samplers

    def adapter(model, x, sigmas, extra_args, callback, disable, **_):
        function(lambda x, sigma: model(x, sigma * x.new_ones([x.shape[0]]), **extra_args), x, sigmas)
        return x

    comfy.sample.sample_custom(
        patcher,
        noise_of(tiny, None, batch, 0),
        cfg,
        comfy.samplers.KSAMPLER(adapter),
        torch.linspace(denoise, 0, 5),
        positive or conditioning(tiny, 1, num_tokens[0]),
        negative or conditioning(tiny, 2, num_tokens[1]),
        noise_of(tiny, None, batch, 9) if denoise < 1 else latent_of(tiny, None, batch, torch.zeros),
        noise_mask=noise_mask,
        disable_pbar=True,
        seed=0,
    )


def relative(output: torch.Tensor, reference: torch.Tensor, tiny: TinyModel | None = None) -> float:
    """Mean absolute difference over mean absolute reference; of `tiny`'s nested latent the worst part's."""
    if tiny is not None and len(tiny.parts) > 1:
        sizes = [math.prod(shape) for shape in tiny.parts]
        parts = zip(output.split(sizes, -1), reference.split(sizes, -1), strict=True)
        return max(relative(*part) for part in parts)
    return float((output - reference).abs().mean() / reference.abs().mean())
