"""diffusers: a pipeline whose transformer runs on the ranks of a mesh, each with a part of the tokens and rows."""

from __future__ import annotations

import inspect
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from ..attention import RankMesh, choose_mesh, init_context_parallel_mesh
from ..batch_rows import BatchRows
from ..families import family_of
from ..mesh_ranks import MeshRanks
from ..sharded_blocks import sharded_blocks
from ..sharded_call import ShardedCall, refuse_unsharded
from ..sharded_operators import attention, operators_of
from ..shared_scales import shared_scales

HOOK = "para_accelerate_parallel"
REFUSED = ("controlnet_block_samples", "controlnet_single_block_samples")
Pipe = TypeVar("Pipe", bound=DiffusionPipeline)


class AttentionOnRanks(TorchFunctionMode):
    """Within it, the attentions that the blocks call are over all ranks' tokens; whatever else is called stays."""

    def __init__(self, sharded: ShardedCall) -> None:
        super().__init__()
        self._sharded = sharded

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attention(*args, **(kwargs or {}))

    def _attention(self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> Tensor:
        compiling = torch.compiler.is_compiling()  # then the operator asks, when it runs
        over = None if compiling else self._sharded.next_attention()
        if over is None and not compiling:
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if is_causal or dropout_p:
            raise ValueError(f"causal attention ({is_causal}) and dropout ({dropout_p}) run on one device only.")
        if attn_mask is not None:
            attn_mask = attn_mask[(None,) * (4 - attn_mask.ndim)]
        if compiling:
            return attention(query, key, value, attn_mask, **options)
        return self._sharded.attention(over, query, key, value, mask=attn_mask, **options)


class ParallelHook(ModelHook):
    """Runs each forward of the transformer on the mesh. Every rank has the same inputs and gets the whole output."""

    def __init__(self, transformer: ModelMixin, mesh: RankMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.ranks = MeshRanks(mesh)
        self._family = family_of(transformer).through_forward()
        self._signature = inspect.signature(transformer.forward)

    def new_forward(self, module: ModelMixin, *args, **kwargs):
        given = self._signature.bind(*args, **kwargs).arguments
        for name in REFUSED:
            if given.get(name) is not None:
                raise ValueError(f"`{name}` cannot be split among ranks; run this pipeline without parallelize_pipe.")
        rows = BatchRows(self.mesh, given["hidden_states"].shape[0], even=True)
        num_blocks = [len(stack.blocks_in(module)) for stack in self._family.stacks]
        sharded = ShardedCall(self._family, num_blocks, self.ranks)
        with (
            operators_of(sharded),
            sharded_blocks(module, self._family, sharded),
            AttentionOnRanks(sharded),
            shared_scales(module),
        ):
            output = self.fn_ref.original_forward(**{name: rows.of(value) for name, value in given.items()})
        if isinstance(output, tuple):
            return (rows.gather(output[0]), *output[1:])
        output.sample = rows.gather(output.sample)
        return output


def parallelize_pipe(pipe: Pipe, *, mesh: DeviceMesh | None = None) -> Pipe:
    """Make every later call of this pipeline object run its transformer on the ranks of `mesh`, and return it.

    Every rank runs the same script with the same inputs and seeds, and gets the same output. mesh: of
    `init_context_parallel_mesh`; None: all ranks, Ulysses as far as the heads divide, a ring for the rest. Applying
    again exchanges the mesh. Collective. Raises ValueError for a transformer that cannot be split.
    """
    transformer = getattr(pipe, "transformer", None)
    if transformer is None:
        raise ValueError(f"{type(pipe).__name__} has no transformer; only diffusion transformers can be split.")
    refuse_unsharded(transformer, family_of(transformer))
    num_heads = transformer.config.num_attention_heads
    rank_mesh = RankMesh.of(_mesh(num_heads, transformer.device.type) if mesh is None else mesh)
    if num_heads % rank_mesh.ulysses.size:
        raise ValueError(
            f"{num_heads} heads do not divide among {rank_mesh.ulysses.size} ranks of Ulysses; allowed are divisors. "
            "Give a mesh with a larger ring."
        )
    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    registry.remove_hook(HOOK, recurse=False)
    registry.register_hook(ParallelHook(transformer, rank_mesh), HOOK)
    return pipe


def _mesh(num_heads: int, device_type: str) -> DeviceMesh:
    if not dist.is_initialized():
        return init_context_parallel_mesh(device_type)  # says what is missing
    shape = choose_mesh(dist.get_world_size(), num_heads=num_heads)
    return init_context_parallel_mesh(device_type, max_ring_dim_size=shape.ring, max_ulysses_dim_size=shape.ulysses)
