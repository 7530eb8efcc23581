"""Cases for test_comfy_sharding.py: what runs on each rank, against the same model on that rank alone."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from tiny_models import TINY_MODELS, build, sample
from torch import Tensor


@functools.cache
def ranks_of(shape: tuple[int, int, int]):
    """The ranks of a mesh of batch x ring x ulysses that share a sequence with this one."""
    from para_core.attention import RankMesh, init_context_parallel_mesh
    from para_core.mesh_ranks import MeshRanks

    batch, ring, _ = shape
    return MeshRanks(RankMesh.of(init_context_parallel_mesh("cpu", max_batch_dim_size=batch, max_ring_dim_size=ring)))


@functools.cache
def model_of(name: str):
    """The seeded weights are the same on every rank."""
    return build(TINY_MODELS[name])


def relative(output, reference) -> float:
    """L2 norm of the difference over the reference's; of a nested latent the worst part's."""
    if isinstance(output, Tensor):
        return float((output - reference).norm() / reference.norm())
    return max(map(relative, output, reference))


class Tokens:
    """Stands around the blocks, inside the sharding, and notes how many tokens each of them is given, call by call."""

    def __init__(self, family) -> None:
        self.stacks, self.seen = family.through_forward().stacks, []

    def __call__(self, stack, index, arguments, compute):
        from para_core.streams import argument_of

        streams = self.stacks[stack].streams
        self.seen.append(sum(argument_of(arguments, stream).shape[stream.token_dim] for stream in streams))
        return compute()


def compare(
    rank: int, world_size: int, *, model: str, mesh: tuple[int, int, int], calls: list[Mapping], change: str = ""
) -> tuple[list[float], list[int], list[int]]:
    """While the model is sampled: relative error of each call, tokens that blocks have on this rank, and alone.

    calls: settings of `sample`, a run for each. change: a function of this module, from a call's keywords to others.
    """
    from para_core.adapters.comfy_sharding import sharded_forward
    from para_core.attention import RankMesh
    from para_core.families import family_of
    from para_core.mesh_ranks import MeshRanks

    patcher = model_of(model)
    diffusion_model = patcher.model.diffusion_model
    family = family_of(diffusion_model)
    errors, here, alone = [], Tokens(family), Tokens(family)

    def both(*args, **kwargs):
        del diffusion_model.forward
        kwargs = globals()[change](kwargs) if change else kwargs
        expected = sharded_forward(diffusion_model, family, MeshRanks(RankMesh()), (args, kwargs), around_blocks=alone)
        output = sharded_forward(diffusion_model, family, ranks_of(mesh), (args, kwargs), around_blocks=here)
        errors.append(relative(output, diffusion_model(*args, **kwargs)))
        assert relative(expected, output) <= 1e-5
        diffusion_model.forward = both
        return expected

    diffusion_model.forward = both
    try:
        for settings in calls:
            sample(patcher, TINY_MODELS[model], steps=1, **settings)
    finally:
        diffusion_model.__dict__.pop("forward", None)
    return errors, here.seen, alone.seen
