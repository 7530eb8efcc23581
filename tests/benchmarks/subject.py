"""The model that the benchmark runs on: any FLUX weights, its prompts and noise, fresh copies, and a block counter."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from para_core.demo import weights
from para_core.demo.prompt import CODE_DIM, encode
from para_core.demo.sampling import SIDE, decode, noise
from para_core.demo.scene import held_out_prompts

from .samplers import Velocity

GUIDANCE = 3.5  # for weights with a guidance embedding
NUM_CONTEXT_TOKENS = 5  # of the random conditioning that other weights than the demo's get
FASTEST_PHASE = 6.0  # rad over the schedule, of the timestep embedding of random weights; trained ones are as slow


@dataclass(frozen=True)
class Case:
    """One picture to draw. prompt is None for weights that take another conditioning than the demo's."""

    prompt: str | None
    context: Tensor
    pooled: Tensor
    tokens: Tensor


def write_snapshot(spec: str | None, file: Path) -> str:
    """Write the weights that `spec` names to `file`, float32 in FLUX's own layout, and return their name.

    spec: None for the demo model, "random:SEED", or a safetensors file in FLUX's or diffusers' layout. Raises
    ValueError for anything else. The copy keeps all processes on the same weights while a training replaces the file.
    """
    if spec is not None and spec.startswith("random:"):
        state_dict = weights.flux_from_diffusers(random_transformer(int(spec[7:])).state_dict())
    else:
        source = weights.TRANSFORMER_FILE if spec is None else Path(spec)
        if not source.is_file():
            raise ValueError(f'--model is "{spec}"; allowed are a safetensors file and random:SEED')
        state_dict = load_file(source)
        state_dict = {key.removeprefix("model.diffusion_model."): value for key, value in state_dict.items()}
        if "x_embedder.weight" in state_dict:
            state_dict = weights.flux_from_diffusers(state_dict)
    save_file({key: value.float().contiguous() for key, value in state_dict.items()}, file)
    return "demo" if spec is None else spec if spec.startswith("random:") else Path(spec).name


def random_transformer(seed: int) -> nn.Module:
    """The demo's architecture with seeded random weights whose output changes slowly over the schedule."""
    model, generator = weights.build_transformer(), torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
        elif name.endswith("bias"):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    first = model.time_text_embed.timestep_embedder.linear_1.weight
    half = first.shape[1] // 2
    phases = 1000 * torch.exp(-math.log(10000) * torch.arange(half) / half).repeat(2)
    first.data *= torch.exp(-((phases / FASTEST_PHASE) ** 2))
    return model.requires_grad_(False).eval()


class Subject:
    """One set of weights in diffusers' class, and `num_prompts` cases plus one that is only for calibrations.

    attention_shares: of each block's floating point operations, by block name.
    """

    def __init__(self, file: Path, num_prompts: int, *, trained: bool) -> None:
        self.file = file
        state_dict = load_file(file)
        self.transformer = transformer_from(state_dict)
        config = self.transformer.config
        drawn = (config.joint_attention_dim, config.pooled_projection_dim) == (CODE_DIM, CODE_DIM)
        drawn = drawn and config.in_channels == weights.IN_CHANNELS
        if drawn:
            prompts = held_out_prompts(num_prompts + 1, seed=7)
            self.cases = [Case(prompt, *encode(prompt), noise(1, seed)) for seed, prompt in enumerate(prompts)]
        else:
            self.cases = [random_case(config, seed) for seed in range(num_prompts + 1)]
        self.autoencoder = weights.load_autoencoder() if drawn and trained else None
        self.num_prompts = num_prompts
        self.attention_shares = attention_shares(self.fresh(), self.cases[0])

    def fresh(self) -> nn.Module:
        """A copy that shares the weights and nothing else: whatever was put on an earlier copy is gone.

        The original must stay without hooks and never be called: diffusers 0.39 keeps a list of hooked children from
        the first `cache_context` on, which the copies would inherit.
        """
        shared = {id(tensor): tensor for tensor in (*self.transformer.parameters(), *self.transformer.buffers())}
        return copy.deepcopy(self.transformer, shared)

    def pictures(self, latents: Tensor) -> Tensor | None:
        """The decoded pictures of final latents (prompts, tokens, channels); None for weights that draw none."""
        return None if self.autoencoder is None else decode(self.autoencoder, latents)


def transformer_from(state_dict: weights.StateDict) -> nn.Module:
    """diffusers' FLUX transformer of the sizes that a checkpoint in FLUX's own layout has."""
    hidden_size = len(state_dict["img_in.weight"])
    head_dim = len(state_dict["double_blocks.0.img_attn.norm.key_norm.scale"])
    time_dim = next(dim for dim in range(head_dim // 8, head_dim) if dim % 2 == 0 and (head_dim - dim) % 4 == 0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=state_dict["img_in.weight"].shape[1],
        num_layers=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("double_blocks.")),
        num_single_layers=1 + max(int(key.split(".")[1]) for key in state_dict if key.startswith("single_blocks.")),
        attention_head_dim=head_dim,
        num_attention_heads=hidden_size // head_dim,
        joint_attention_dim=state_dict["txt_in.weight"].shape[1],
        pooled_projection_dim=state_dict["vector_in.in_layer.weight"].shape[1],
        guidance_embeds="guidance_in.in_layer.weight" in state_dict,
        axes_dims_rope=(time_dim, (head_dim - time_dim) // 2, (head_dim - time_dim) // 2),
    )
    model.load_state_dict(weights.flux_to_diffusers(state_dict), assign=True)
    return model.requires_grad_(False).eval()


def random_case(config, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, NUM_CONTEXT_TOKENS, config.joint_attention_dim, generator=generator)
    pooled = torch.randn(1, config.pooled_projection_dim, generator=generator)
    return Case(None, context, pooled, torch.randn(1, SIDE * SIDE, config.in_channels, generator=generator))


def velocity_of(transformer: nn.Module, case: Case) -> Velocity:
    """The model as a sampler calls it; in the cache context that diffusers' pipelines set for the one pass of cfg 1."""
    img_ids = torch.zeros(SIDE, SIDE, 3)
    img_ids[..., 1], img_ids[..., 2] = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    constant = {
        "encoder_hidden_states": case.context,
        "pooled_projections": case.pooled,
        "txt_ids": torch.zeros(case.context.shape[1], 3),
        "img_ids": img_ids.reshape(-1, 3),
        "guidance": torch.full((1,), GUIDANCE) if transformer.config.guidance_embeds else None,
    }

    def velocity(tokens: Tensor, sigma: Tensor) -> Tensor:
        with transformer.cache_context("cond"):
            return transformer(hidden_states=tokens, timestep=sigma.expand(1), return_dict=False, **constant)[0]

    return velocity


def named_blocks(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for stack in ("transformer_blocks", "single_transformer_blocks"):
        for index, block in enumerate(getattr(transformer, stack)):
            yield f"{stack}.{index}", block


@torch.no_grad()
def attention_shares(transformer: nn.Module, case: Case) -> dict[str, float]:
    """What part of each block's floating point operations is in its attention module, by block name."""
    # MATH: the fused kernels of the CPU are not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        velocity_of(transformer, case)(case.tokens, torch.tensor(0.5))
    sums = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    root = type(transformer).__name__
    return {name: sums[f"{root}.{name}.attn"] / sums[f"{root}.{name}"] for name, _ in named_blocks(transformer)}


class BlockCalls:
    """Counts the blocks that a model really computes, from now on; attention and the rest are counted apart.

    A block's attention alone counts as its share of the block's operations. The hooks sit inside of what the libraries
    replace or skip, so a reused result is never counted, whoever reuses it.
    """

    def __init__(self, transformer: nn.Module, shares: dict[str, float]) -> None:
        self.count = 0.0
        for name, block in named_blocks(transformer):
            rest = block.proj_mlp if hasattr(block, "proj_mlp") else block.ff.net[0].proj
            self._count(block.attn.to_q, shares[name])
            self._count(rest, 1 - shares[name])
        self.num_blocks = len(shares)

    def _count(self, module: nn.Module, share: float) -> None:
        def add(*_) -> None:
            self.count += share

        module.register_forward_pre_hook(add)

    def saved(self, num_calls: int) -> float:
        """The share of block calls that were not computed in `num_calls` model calls."""
        return 1 - self.count / (num_calls * self.num_blocks)
