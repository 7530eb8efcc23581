"""Cases for test_comfy_sharding.py: what runs on each rank, against the same model on that rank alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import torch
from tiny_models import TINY_MODELS, build, conditioning, sample
from torch import Tensor

VACE = TINY_MODELS["wan_vace"]
# A branch behind the last block too, whose result meets the gathered tokens.
EVERY_BLOCK = replace(VACE, unet_config=VACE.unet_config | {"vace_layers": 4})
TINIES = TINY_MODELS | {"wan_vace_every_block": EVERY_BLOCK}


@functools.cache
def mesh_of(shape: tuple[int, int, int]):
    """This rank's place in a mesh of batch x ring x ulysses ranks."""
    from para_core.attention import RankMesh, init_context_parallel_mesh

    batch, ring, _ = shape
    return RankMesh.of(init_context_parallel_mesh("cpu", max_batch_dim_size=batch, max_ring_dim_size=ring))


@functools.cache
def model_of(name: str):
    """The seeded weights are the same on every rank."""
    return build(TINIES[name])


def relative(output, reference) -> float:
    """L2 norm of the difference over the reference's; of a nested latent the worst part's."""
    if isinstance(output, Tensor):
        return float((output - reference).norm() / reference.norm())
    return max(map(relative, output, reference))


class Seen:
    """Stands around the blocks, inside the sharding, and notes the rows and tokens that each of them is given."""

    def __init__(self, family) -> None:
        self.stacks = family.through_forward().stacks
        self.shapes: list[tuple[int, int]] = []

    def __call__(self, stack, index, arguments, compute):
        from para_core.streams import argument_of

        found = [(stream, argument_of(arguments, stream)) for stream in self.stacks[stack].streams]
        tokens = sum(
            tensor.shape[stream.token_dim : stream.token_dim + stream.grid].numel() for stream, tensor in found
        )
        self.shapes.append((found[0][1].shape[found[0][0].batch_dim], tokens))
        return compute()


def on_mesh(model, family, mesh, call, around):
    """The model call on the ranks of a mesh: its rows split along the batch axis, its tokens along the others."""
    from para_core.adapters.comfy_batch import BatchShare
    from para_core.adapters.comfy_sharding import sharded_forward
    from para_core.mesh_ranks import MeshRanks

    share = BatchShare.of(mesh, call)
    output = share.gather(sharded_forward(model, family, MeshRanks(mesh), share.call, around_blocks=around))
    left = [name for name, block in model.named_modules() if "forward" in block.__dict__]
    assert not left, f"{left} were not put back"
    return output


def quantized(rank: int, world_size: int, *, model: str, mesh: tuple[int, int, int]) -> tuple[int, list[float]]:
    """How many weights are quantized, and relative errors as `compare`'s of a model with these."""
    from para_core.adapters.comfy_quantization import apply_quantization

    patcher, report = apply_quantization(model_of(model), "int8_weight_only")
    calls = [{"positive": conditioning(TINIES[model], 1, 9)}]
    return len(report.quantized), compare(rank, world_size, model=model, mesh=mesh, calls=calls, patcher=patcher)[0]


def compare(
    rank: int,
    world_size: int,
    *,
    model: str,
    mesh: tuple[int, int, int],
    calls: list[Mapping],
    change: Mapping | None = None,
    patcher=None,
) -> tuple[list[float], list[tuple[int, int]], list[tuple[int, int]]]:
    """While the model is sampled: relative error of each call, what blocks see on this rank, what they see alone.

    calls: settings of `sample`, a run for each. change: name to value of what each call is given besides. patcher: of
    this model, None as it is built.
    """
    from para_core.attention import RankMesh
    from para_core.families import family_of

    patcher, change = patcher or model_of(model), change or {}
    diffusion_model = patcher.model.diffusion_model
    family = family_of(diffusion_model)
    errors, here, alone = [], Seen(family), Seen(family)

    def both(*args, **kwargs):
        del diffusion_model.forward
        plain = diffusion_model(*args, **kwargs)
        call = args, {**kwargs, **change}
        expected = diffusion_model(*args, **call[1])
        assert not change or relative(expected, plain) > 1e-3, "no effect, so this test shows nothing"
        assert relative(on_mesh(diffusion_model, family, RankMesh(), call, alone), expected) <= 1e-6
        errors.append(relative(on_mesh(diffusion_model, family, mesh_of(mesh), call, here), expected))
        diffusion_model.forward = both
        return expected

    diffusion_model.forward = both
    try:
        for settings in calls:
            sample(patcher, TINIES[model], steps=1, **settings)
    finally:
        diffusion_model.__dict__.pop("forward", None)
    return errors, here.shapes, alone.shapes


def cached(rank: int, world_size: int, *, model: str, mesh: tuple[int, int, int]) -> tuple[list, list, bool]:
    """The cache inside the sharding: errors of a computed, a measured and a foreseen call, and what it recorded."""
    from para_core.cache_run import CacheRun
    from para_core.families import family_of
    from para_core.mesh_ranks import MeshRanks
    from para_core.residual_cache import CacheConfig
    from para_core.run_state import Step

    patcher = model_of(model)
    diffusion_model = patcher.model.diffusion_model
    family = family_of(diffusion_model).through_forward()
    num_blocks = [len(stack.blocks_in(diffusion_model)) for stack in family.stacks]
    run = CacheRun(family, CacheConfig(0.01, decision="prediction"), reduce=MeshRanks(mesh_of(mesh)).sum)
    errors, seen = [], set()

    def twice(*args, **kwargs):
        del diffusion_model.forward
        expected = diffusion_model(*args, **kwargs)
        for index in range(3):
            with run.call(family, num_blocks, {"key": "positive"}, Step(index, 1.0, at=1 - 0.1 * index)) as call:

                def around(stack, index, arguments, compute, call=call):
                    seen.add((stack, index))
                    return call.block(stack, index, arguments, compute)

                output = on_mesh(diffusion_model, family, mesh_of(mesh), (args, kwargs), around)
            errors.append(relative(output, expected))
        diffusion_model.forward = twice
        return expected

    diffusion_model.forward = twice
    try:
        sample(patcher, TINIES[model], steps=1, positive=conditioning(TINIES[model], 1, 9))
    finally:
        diffusion_model.__dict__.pop("forward", None)
    records = [(record.reused, record.diff is None) for record in run.report().conditionings["positive"]]
    return errors, records, len(seen) == sum(num_blocks)


def compiled(rank: int, world_size: int, *, model: str, mesh: tuple[int, int, int]) -> tuple[list[float], int, dict]:
    """Traced blocks (no code is generated) on the ranks: errors of two calls, compilations, what was not compiled."""
    from para_core.adapters.comfy_compile import HostEntrance
    from para_core.adapters.comfy_sharding import AttentionOnRanks, sharded_forward
    from para_core.compilation import Compilation
    from para_core.compile_config import CompileConfig
    from para_core.families import family_of
    from para_core.mesh_ranks import MeshRanks

    patcher = model_of(model)
    diffusion_model = patcher.model.diffusion_model
    family = family_of(diffusion_model)
    compilation, attention = Compilation(CompileConfig(backend="eager", dynamic="on")), AttentionOnRanks()
    errors = []

    def both(*args, **kwargs):
        del diffusion_model.forward
        expected = diffusion_model(*args, **kwargs)
        for _ in range(2):
            with compilation.run(diffusion_model, family, entrance=HostEntrance()) as run:
                output = sharded_forward(
                    diffusion_model, family, MeshRanks(mesh_of(mesh)), (args, kwargs), attention_on_ranks=attention
                )
            errors.append(relative(output, expected))
        assert run.compiled == [], "the second run was compiled again"
        uncompiled.update(run.uncompiled)
        diffusion_model.forward = both
        return expected

    uncompiled: dict[str, int] = {}
    diffusion_model.forward = both
    try:
        sample(patcher, TINIES[model], steps=1, positive=conditioning(TINIES[model], 1, 9))
    finally:
        diffusion_model.__dict__.pop("forward", None)
    return errors, len(compilation.compiled), uncompiled


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
