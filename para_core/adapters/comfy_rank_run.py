"""ComfyUI on a rank: one sampling run of a model whose tokens are spread over the ranks."""

from __future__ import annotations

from collections.abc import Mapping

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ..cache_run import CacheRun
from ..families import family_of
from ..first_block import CachedCall, Step
from ..mesh_ranks import MeshRanks
from ..residual_cache import CacheConfig
from .comfy_batch import BatchShare
from .comfy_options import diffusion_model_of
from .comfy_sharding import sharded_forward
from .comfy_travel import received, sendable


class RankRun:
    """Holds what the calls of one run share: the model on its device, the ranks and the cache."""

    def __init__(self, patcher: ModelPatcher, payload: Mapping, ranks: MeshRanks) -> None:
        comfy.model_management.load_models_gpu([patcher], memory_required=payload["memory"])
        self._patcher = patcher
        self._model = diffusion_model_of(patcher.model)
        self._family = family_of(self._model).through_forward()
        self._num_blocks = [len(stack.blocks_in(self._model)) for stack in self._family.stacks]
        self._ranks = ranks
        settings = payload["cache"]
        self._cache = None if settings is None else CacheRun(self._family, CacheConfig(**settings), reduce=ranks.sum)

    def forward(self, payload: Mapping) -> dict:
        """One model call, its arguments and its result as `sendable` makes them."""
        args = tuple(received(value) for value in payload["args"])
        kwargs = {name: received(value) for name, value in payload["kwargs"].items()}
        kwargs["transformer_options"] = {name: received(value) for name, value in payload["options"].items()}
        if payload["cache"] is None or self._cache is None:
            share = BatchShare.of(self._ranks.mesh, (args, kwargs))
            output = share.gather(sharded_forward(self._model, self._family, self._ranks, share.call))
            return {"output": sendable(output, "output"), "cache": None}
        keys = dict(zip(payload["cache"]["keys"], payload["cache"]["names"], strict=True))
        step = Step(**payload["cache"]["step"])
        with self._cache.call(self._family, self._num_blocks, keys, step) as call:
            output = sharded_forward(self._model, self._family, self._ranks, (args, kwargs), around_blocks=call.block)
        return {"output": sendable(output, "output"), "cache": self._decided(call)}

    def _decided(self, call: CachedCall) -> dict:
        return {
            "decided": call.decided,
            "reuses": call.reuses,
            "diffs": call.diffs,
            "num_bytes": self._cache.num_bytes,
        }
