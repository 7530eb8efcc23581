"""ComfyUI: one sampling run on the ranks, as the server knows it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field

from ..cache_run import CacheRun
from .comfy_call_mesh import CallMeshes
from .comfy_compile import NAME as COMPILE
from .comfy_compile import CompileOption
from .comfy_kept_calls import KeptCalls
from .comfy_stand_in import RemoteCall


@dataclass
class Run:
    """One sampling run on the ranks. begun: the payload of `begin`, None before the first model call.

    loads: the ranks were asked for what they load the model for, whether they did or not. calls: those so far on which
    later ones depend; None without the cache.
    """

    settings: dict
    meshes: CallMeshes
    begun: dict | None = None
    loads: bool = False
    calls: KeptCalls | None = None
    keys: dict[Hashable, int] = field(default_factory=dict)  # of conditionings, as the ranks know them
    compile: CompileOption | None = None
    num_restarts: int = 0

    def begin_payload(self, ours: Mapping[str, object]) -> dict:
        """What the ranks set up for it. ours: this pack's options of the first call."""
        cache: CacheRun | None = getattr(ours.get("run"), "cache", None)
        self.compile = ours.get(COMPILE)
        self.calls = None if cache is None else KeptCalls(cache.config)
        return self.settings | {
            "cache": None if cache is None else _cache_settings(cache),
            "compile": None if self.compile is None else _compile_settings(self.compile),
        }

    def cache_payload(self, call: RemoteCall) -> dict:
        """What the cache needs to know of a call."""
        keys = [self.keys.setdefault(key, len(self.keys)) for key in call.conditionings]
        return {"keys": keys, "names": list(call.conditionings.values()), "step": asdict(call.step)}


def _compile_settings(option: CompileOption) -> dict:
    cache = option.compilation.cache
    return {"config": asdict(option.config), "directory": None if cache is None else str(cache.directory)}


def _cache_settings(cache: CacheRun) -> dict:
    return asdict(cache.config) | {"residual_diff_threshold": None if cache.config.target_speedup else cache.threshold}
