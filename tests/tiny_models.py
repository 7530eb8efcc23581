"""Tiny models of ComfyUI's own classes with random weights, and one way to sample them through its real sampler."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class TinyModel:
    """How to build one family small. config: class name in comfy.supported_models; latent: shape without the batch."""

    config: str
    unet_config: dict
    latent: tuple[int, ...]
    context_dim: int
    pooled_dim: int = 0
    num_tokens: int = 7  # odd on purpose
    cond: dict = field(default_factory=dict)
    since_033: dict = field(default_factory=dict)  # keys of unet_config that ComfyUI 0.3 does not know


FLUX = TinyModel(
    "FluxSchnell",
    {
        "image_model": "flux", "guidance_embed": False, "in_channels": 16, "out_channels": 16, "patch_size": 2,
        "vec_in_dim": 64, "context_in_dim": 64, "hidden_size": 256, "mlp_ratio": 4.0, "num_heads": 2, "depth": 2,
        "depth_single_blocks": 3, "axes_dim": [16, 56, 56], "theta": 10000, "qkv_bias": True,
    },
    latent=(16, 10, 14), context_dim=64, pooled_dim=64, since_033={"txt_ids_dims": []},
)  # fmt: skip

WAN = TinyModel(
    "WAN21_T2V",
    {
        "image_model": "wan2.1", "model_type": "t2v", "patch_size": (1, 2, 2), "in_dim": 16, "dim": 256,
        "ffn_dim": 512, "freq_dim": 256, "text_dim": 64, "out_dim": 16, "num_heads": 4, "num_layers": 4,
    },
    latent=(16, 3, 6, 10), context_dim=64,
)  # fmt: skip

TINY_MODELS = {"flux": FLUX, "wan": WAN}


def build(tiny: TinyModel, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A ModelPatcher over a fresh model with seeded weights, large enough that attention is far from uniform."""
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models
    from comfyui_version import __version__

    newer = tiny.since_033 if tuple(map(int, __version__.split(".")))[:2] >= (0, 33) else {}
    config = getattr(comfy.supported_models, tiny.config)(tiny.unet_config | newer)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.diffusion_model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            noise *= 1.5 / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            noise *= 0.1
        else:  # norm scales; those of queries and keys sharpen the attention
            noise = 1.5 + 0.3 * noise
        parameter.data.copy_(noise)
    device = comfy.model_management.get_torch_device()
    patcher = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)  # 0.3 has only the latter
    return patcher(model, load_device=device, offload_device=torch.device("cpu"))


def conditioning(tiny: TinyModel, seed: int, num_tokens: int | None = None, **extra) -> list:
    generator = torch.Generator().manual_seed(1000 + seed)
    values = dict(tiny.cond) | extra
    if tiny.pooled_dim:
        values["pooled_output"] = torch.randn(1, tiny.pooled_dim, generator=generator)
    return [[torch.randn(1, num_tokens or tiny.num_tokens, tiny.context_dim, generator=generator), values]]


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
) -> torch.Tensor:
    """The final latent, (batch, *latent), through ComfyUI's KSampler. num_tokens: of the positive, the negative."""
    import comfy.sample

    empty = torch.zeros(batch, *(latent or tiny.latent))
    return comfy.sample.sample(
        patcher,
        torch.randn(empty.shape, generator=torch.Generator().manual_seed(seed)),
        steps,
        cfg,
        sampler,
        "simple",
        positive or conditioning(tiny, 1, num_tokens[0]),
        negative or conditioning(tiny, 2, num_tokens[1]),
        empty,
        denoise=denoise,
        disable_pbar=True,
        seed=seed,
    )


def relative(output: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean absolute difference over mean absolute reference."""
    return float((output - reference).abs().mean() / reference.abs().mean())


def with_sampler(patcher, tiny: TinyModel, function, *, cfg: float = 1.0, num_tokens=(7, 5), batch: int = 1, **conds):
    """Run `function(model, x, sigmas, **extra_args)` as the sampler of a 4-step run, inside ComfyUI's own guider.

    Within it `model(x, sigma)` is a guided model call, as samplers make it.
    """
    import comfy.sample
    import comfy.samplers

    def adapter(model, x, sigmas, extra_args, callback, disable, **_):
        function(lambda x, sigma: model(x, sigma * x.new_ones([x.shape[0]]), **extra_args), x, sigmas)
        return x

    empty = torch.zeros(batch, *tiny.latent)
    comfy.sample.sample_custom(
        patcher,
        torch.randn(empty.shape, generator=torch.Generator().manual_seed(0)),
        cfg,
        comfy.samplers.KSAMPLER(adapter),
        torch.linspace(1, 0, 5),
        conds.get("positive") or conditioning(tiny, 1, num_tokens[0]),
        conds.get("negative") or conditioning(tiny, 2, num_tokens[1]),
        empty,
        disable_pbar=True,
        seed=0,
    )
