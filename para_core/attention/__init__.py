"""Attention over a sequence that is divided among ranks; `context_attention` is the entry.

Imports point one way: context -> {ring, ulysses} -> {kernels, sequence} -> {mesh, masks} -> torch.
"""

from .context import LocalAttention, context_attention
from .kernels import BACKENDS, require_lse
from .mesh import AXES, Axis, MeshShape, RankMesh, device_mesh, init_context_parallel_mesh
from .mesh_choice import MeshRequest, choose_mesh, rows_divide
from .sequence import all_gather_sequence, balanced_lengths, slice_of

__all__ = [
    "AXES",
    "BACKENDS",
    "Axis",
    "LocalAttention",
    "MeshRequest",
    "MeshShape",
    "RankMesh",
    "all_gather_sequence",
    "balanced_lengths",
    "choose_mesh",
    "context_attention",
    "device_mesh",
    "init_context_parallel_mesh",
    "require_lse",
    "rows_divide",
    "slice_of",
]
