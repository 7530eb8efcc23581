"""ComfyUI: the model calls of a run that a group which restarted makes again, so that its cache is as it was."""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ..residual_cache import CacheConfig
from .comfy_stand_in import RemoteCall
from .comfy_travel import tensors_in

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeptCall:
    """num_bytes: of the payload's tensors."""

    payload: Mapping
    keys: tuple[Hashable, ...]
    time: float
    reused: bool
    num_bytes: int


class KeptCalls:
    """Payloads of `forward`, the earliest first.

    What "first_block" goes by are the newest computed calls alone; "prediction" and target_speedup learn from every
    call. complete: no call is missing. Beyond MAX_BYTES (a ControlNet brings gigabytes a call) nothing is kept any
    more: the caches of a group that restarts are then empty, and the run goes on as after its first step.
    """

    MAX_BYTES = 2**31

    def __init__(self, config: CacheConfig) -> None:
        self._config = config
        self._calls: list[KeptCall] = []
        self.complete = True

    def add(self, payload: Mapping, call: RemoteCall) -> None:
        """A call that was made, its payload in CPU memory."""
        if not self.complete or not call.decided:
            return
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(payload))
        shortened = self._config.decision == "first_block" and not self._config.target_speedup
        if shortened and not call.reuses:
            payload = _surely_computed(payload)
        self._calls.append(KeptCall(payload, tuple(call.conditionings), call.step.time, call.reuses, size))
        if shortened:
            self._calls = self._needed()
        if self.num_bytes > self.MAX_BYTES:
            self._calls, self.complete = [], False

    def payloads(self) -> list[Mapping]:
        """To be made again, which is told where some are missing."""
        if not self.complete:
            logger.warning(
                "The ranks restarted in a run whose model calls are too large to keep (over %d GiB): FBCache starts "
                "anew, as after the first step. The picture may differ a little.",
                self.MAX_BYTES >> 30,
            )
        return [call.payload for call in self._calls]

    @property
    def num_bytes(self) -> int:
        return sum(call.num_bytes for call in self._calls)

    def _needed(self) -> list[KeptCall]:
        """Of every conditioning the computed calls that its cache holds, and, if they are limited, the hits since."""
        held: dict[Hashable, set[float]] = {}
        needed = []
        for call in reversed(self._calls):
            times = [held.setdefault(key, set()) for key in call.keys]
            if call.reused:
                wanted = self._config.max_consecutive_hits > 0 and not all(times)
            else:
                lacking = [of_one for of_one in times if len(of_one) <= self._config.order and call.time not in of_one]
                for of_one in lacking:
                    of_one.add(call.time)
                wanted = bool(lacking)
            if wanted:
                needed.append(call)
        return needed[::-1]


def _surely_computed(payload: Mapping) -> Mapping:
    """The same call; without the reused ones before it the cache might find that this one can be reused too."""
    cache = payload["cache"]
    return {**payload, "cache": {**cache, "step": {**cache["step"], "allowed": False}}}


def on_cpu(value: object) -> object:
    """Sendable data with its tensors in CPU memory: the sampling device has no room for those of a whole run."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, Mapping):
        return {key: on_cpu(item) for key, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list) else value
