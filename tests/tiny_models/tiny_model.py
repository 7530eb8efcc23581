"""One of ComfyUI's own model classes, small, with seeded random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch


@dataclass(frozen=True)
class TinyModel:
    """How to build one model small.

    title: what people call it. family: of para_core.families. config: class name in comfy.supported_models.
    latent: shape without the batch; of a nested latent a shape for each part.
    extra: (this, generator, number of text tokens) to what else the conditioning carries.
    shrink: exchanges parts whose size the host fixes. buffers: saved with the weights, so they need values too.
    since: the first ComfyUI version of those tested that has the model.
    since_033: keys of unet_config that ComfyUI 0.3 does not know.
    """

    title: str
    family: str
    config: str
    unet_config: dict
    latent: tuple[int, ...] | tuple[tuple[int, ...], ...]
    context_dim: int = 64
    pooled_dim: int = 0
    extra: Callable[[TinyModel, torch.Generator, int], dict] | None = None
    shrink: Callable[[torch.nn.Module], None] | None = None
    buffers: tuple[str, ...] = ()
    since: str = "0.3.64"
    since_033: dict = field(default_factory=dict)

    @property
    def parts(self) -> tuple[tuple[int, ...], ...]:
        """The shape of each part of the latent."""
        return self.latent if isinstance(self.latent[0], tuple) else (self.latent,)


def randn(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator)


def padded(tiny: TinyModel, generator: torch.Generator, num_tokens: int) -> dict:
    """The last two text tokens are padding."""
    mask = torch.ones(1, num_tokens, dtype=torch.long)
    mask[:, -2:] = 0
    return {"attention_mask": mask}


def host_version() -> tuple[int, ...]:
    from comfyui_version import __version__

    return tuple(map(int, __version__.split(".")))


def build(tiny: TinyModel, seed: int = 0, dtype: torch.dtype = torch.float32):
    """A ModelPatcher over a fresh model with seeded weights, large enough that attention is far from uniform.

    Skips the test where this ComfyUI does not have the model.
    """
    import comfy.model_management
    import comfy.model_patcher
    import comfy.supported_models

    if host_version() < tuple(map(int, tiny.since.split("."))):
        pytest.skip(f"ComfyUI {'.'.join(map(str, host_version()))} has no {tiny.title}; {tiny.since} has")
    newer = tiny.since_033 if host_version()[:2] >= (0, 33) else {}
    config = getattr(comfy.supported_models, tiny.config)(tiny.unet_config | newer)
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "")
    if tiny.shrink:
        tiny.shrink(model.diffusion_model)
    fill(model.diffusion_model, tiny.buffers, torch.Generator().manual_seed(seed))
    device = comfy.model_management.get_torch_device()
    patcher = getattr(
        comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher
    )  # 0.3 has only the latter
    return patcher(model, load_device=device, offload_device=torch.device("cpu"))


def fill(model: torch.nn.Module, buffers: tuple[str, ...], generator: torch.Generator) -> None:
    """Comfy's layers leave their weights uninitialised."""
    named = dict(model.named_parameters()) | {name: model.get_buffer(name) for name in buffers}
    for name, parameter in named.items():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            noise *= 1.5 / parameter[0].numel() ** 0.5
        elif name.endswith("bias"):
            noise *= 0.1
        else:  # norm scales; those of queries and keys sharpen the attention
            noise = 1.5 + 0.3 * noise
        parameter.data.copy_(noise)


def size_of(model) -> int:
    """Bytes of its weights."""
    return sum(parameter.nbytes for parameter in model.model.parameters())


def conditioning(tiny: TinyModel, seed: int, num_tokens: int = 7, **more) -> list:
    """What a text encoder and the nodes behind it would give: another one for each seed."""
    generator = torch.Generator().manual_seed(1000 + seed)
    context = randn(generator, 1, num_tokens, tiny.context_dim)
    values = {"pooled_output": randn(generator, 1, tiny.pooled_dim)} if tiny.pooled_dim else {}
    return [[context, values | (tiny.extra(tiny, generator, num_tokens) if tiny.extra else {}) | more]]
