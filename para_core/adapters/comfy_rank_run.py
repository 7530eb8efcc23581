"""ComfyUI on a rank: one sampling run of a model whose tokens are spread over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..cache_run import CacheRun
from ..compilation import Compilation, CompileRun
from ..families import family_of
from ..first_block import CachedCall
from ..mesh_ranks import MeshRanks
from ..residual_cache import CacheConfig
from ..run_state import Step
from ..sharded_blocks import AroundBlocks
from ..sharded_call import ShardedCall
from ..sharded_operators import operators_of
from ..shared_scales import shared_scales
from .comfy_batch import BatchShare, Call
from .comfy_compile import HostEntrance
from .comfy_options import diffusion_model_of
from .comfy_parts import computed
from .comfy_sharding import AttentionOnRanks, sharded_forward
from .comfy_travel import received, sendable


class RankRun:
    """Holds what the calls of one run share: the model on its device, the ranks, the cache and the compiled code."""

    def __init__(
        self,
        patcher: ModelPatcher,
        payload: Mapping,
        *,
        ranks: Callable[[tuple[int, int, int]], MeshRanks],
        attention: AttentionOnRanks,
        compilation: Compilation | None = None,
    ) -> None:
        """ranks: those of a mesh of these sizes. attention, compilation: the same in every run of a model.

        compilation None: the blocks run as they are.
        """
        self._patcher, self._memory = patcher, payload["memory"]
        self._load()
        self._model = diffusion_model_of(patcher.model)
        self._family = family_of(self._model).through_forward()
        self._num_blocks = [len(stack.blocks_in(self._model)) for stack in self._family.stacks]
        self._ranks_of, self._ranks = ranks, ranks((1, 1, 1))
        self._attention = attention
        settings = payload["cache"]
        self._cache = None if settings is None else CacheRun(self._family, CacheConfig(**settings), reduce=self._sum)
        self._open = ExitStack()
        self._compiled: CompileRun | None = None
        if compilation is not None:
            running = compilation.run(self._model, self._family, entrance=HostEntrance())
            self._compiled = self._open.enter_context(running)
        self._open.enter_context(shared_scales(self._model))

    def _sum(self, values: Tensor) -> Tensor:
        return self._ranks.sum(values)

    def _load(self) -> None:
        comfy.model_management.load_models_gpu([self._patcher], memory_required=self._memory)
        self._on_device = True

    def _load_again(self) -> None:
        """Where it has left the device."""
        if not self._on_device:
            self._load()

    def leave_device(self) -> None:
        """The model's weights are about to leave the device; the next call loads them there again."""
        self._on_device = False

    def compute(self, payload: Mapping) -> dict:
        """What the model computes outside of its calls, as it does on one device: every rank has all of it."""
        self._load_again()
        with operators_of(ShardedCall(self._family, self._num_blocks, self._ranks_of((1, 1, 1)), {})):
            return computed(self._model, payload)

    def end(self) -> dict | None:
        """Put the model back as it was; what compiling has cost."""
        self._open.close()
        return self._compile_report()

    def forward(self, payload: Mapping) -> dict:
        """One model call, its arguments and its result as `sendable` makes them."""
        self._load_again()
        args = tuple(received(value) for value in payload["args"])
        kwargs = {name: received(value) for name, value in payload["kwargs"].items()}
        kwargs["transformer_options"] = {name: received(value) for name, value in payload["options"].items()}
        self._ranks = self._ranks_of(tuple(payload["mesh"]))
        cached = payload["cache"] is not None and self._cache is not None
        share = BatchShare.of(self._ranks.mesh, (args, kwargs), even=cached)
        if not cached:
            return self._answer(share.gather(self._sharded(share.call)), None)
        keys = dict(zip(payload["cache"]["keys"], payload["cache"]["names"], strict=True))
        step = Step(**payload["cache"]["step"])
        with self._cache.call(self._family, self._num_blocks, keys, step, here=share.rows.conditionings) as call:
            output = share.gather(self._sharded(share.call, around_blocks=call.block))
        return self._answer(output, self._decided(call))

    def _sharded(self, call: Call, **around: AroundBlocks) -> Tensor:
        return sharded_forward(
            self._model, self._family, self._ranks, call, attention_on_ranks=self._attention, **around
        )

    def _answer(self, output: Tensor, cache: dict | None) -> dict:
        return {"output": sendable(output, "output"), "cache": cache, "compile": self._compile_report()}

    def _compile_report(self) -> dict | None:
        return None if self._compiled is None else sendable(asdict(self._compiled.report()), "compile report")

    def _decided(self, call: CachedCall) -> dict:
        return {
            "decided": call.decided,
            "reuses": call.reuses,
            "measured": call.measured,
            "diffs": call.diffs,
            "num_bytes": self._cache.num_bytes,
        }


def compute_before_run(patcher: ModelPatcher, payload: Mapping) -> dict:
    """As `RankRun.compute` in front of the run's first model call, with which the run begins."""
    comfy.model_management.load_models_gpu([patcher], memory_required=payload["memory"])
    return computed(diffusion_model_of(patcher.model), payload)
