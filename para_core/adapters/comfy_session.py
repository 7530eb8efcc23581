"""ComfyUI: what the server has asked of a group of ranks, so that it can be asked again of a group that restarted."""

from __future__ import annotations

import logging
import pickle
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Protocol

import comfy.model_management
import torch
from comfy.cli_args import args as host_arguments
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..compile_report import Compiled, CompileReport
from ..workers import GroupConfig, WorkerError
from .comfy_call_mesh import CallMeshes
from .comfy_device_watch import DeviceWatch
from .comfy_kept_calls import on_cpu
from .comfy_options import KEY
from .comfy_parts import on
from .comfy_prepared import Prepared
from .comfy_remote_run import Run
from .comfy_stand_in import RemoteCall
from .comfy_travel import received, sendable, sendable_options

logger = logging.getLogger(__name__)
TIDY_AFTER = 1.0  # seconds


class Group(Protocol):
    """Of para_core.workers, what a session needs."""

    config: GroupConfig
    alive: bool
    connected: bool
    recover: Callable[[], None] | None

    def call(self, method: str, payload: Mapping, **settings) -> object: ...

    def turn(self, cancelled: Callable[[], bool] | None = None) -> AbstractContextManager: ...

    def state(self) -> dict: ...


class Session:
    """Everything that the ranks of one group hold for this process; made once for each group."""

    def __init__(self, group: Group) -> None:
        self.group = group
        group.recover = self._replay
        self.prepared = Prepared(self._ask, self.world_size, self._tidy_soon)
        self._configured = False
        self.mesh = ""  # of the latest run, in words
        self.replaced: tuple[str, ...] = ()  # devices of groups that were ended to start this one, for this run
        self.twin: ModelPatcher | None = None  # of the latest run: what the host knows of the ranks' model
        self._watch = DeviceWatch(self.detached)
        self._run: Run | None = None

    @property
    def world_size(self) -> int:
        return len(self.group.config.devices)

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """One for each rank."""
        return tuple(map(torch.device, self.group.config.devices))

    @property
    def asked(self) -> bool:
        """Whether the present run has called the model."""
        return self._run is not None and self._run.begun is not None

    @property
    def num_restarts(self) -> int:
        """Of the group, during the present run."""
        return 0 if self._run is None else self._run.num_restarts

    def prepare(self, model: ModelPatcher) -> dict:
        """`Prepared.model`; nothing of it is forgotten meanwhile."""
        with self.group.turn(cancelled):
            return self.prepared.model(model)

    def prepare_vae(self, vae: ModelPatcher) -> dict:
        """`Prepared.vae`, in the same way."""
        with self.group.turn(cancelled):
            return self.prepared.vae(vae)

    def missing(self, model: ModelPatcher) -> list[int]:
        """Of each rank, how many bytes of this model's weights are not on its device, whatever the LoRAs in them.

        Only the ranks know: they load in part where room is short, and push a part off for another model or a VAE.
        """
        with self.group.turn(cancelled):
            name = self.prepared.built_as(model) if self.group.connected else None
            found = None if name is None else self._ask("missing", {"model": name})["bytes"]
        return found or [model.model_size()] * self.world_size

    def stands_for_ranks(self, patcher: ModelPatcher) -> bool:
        """Whether this one of the host's list of models is there in the place of what the ranks have."""
        return patcher is self.twin or patcher in self._watch

    def decode(self, names: dict, samples: Tensor, options: dict) -> Tensor:
        """What the VAE of these names decodes, computed by all ranks. names: and its other settings there."""
        payload = names | {
            "samples": samples,
            "options": {name: sendable(value, name) for name, value in options.items()},
        }
        self._watch_devices()
        return self._ask("decode_vae", payload)["images"].to(samples.device)

    def start_run(self, settings: dict, meshes: CallMeshes) -> None:
        """A sampling run follows; settings: the payload of `begin` as far as it is known."""
        self._run = Run(settings, meshes)
        self._watch_devices()

    def forward(self, args: tuple, kwargs: dict) -> object:
        """One model call on the ranks: the diffusion model's output for these arguments."""
        options = kwargs["transformer_options"]
        call: RemoteCall | None = options.get(KEY, {}).get("call")
        payload = {
            "args": [sendable(value, f"argument {number}") for number, value in enumerate(args)],
            "kwargs": {name: sendable(value, name) for name, value in kwargs.items() if name != "transformer_options"},
            "options": sendable_options(options),
            "cache": None if call is None else self._run.cache_payload(call),
            "mesh": list(self._run.meshes.of(args, options).sizes),
        }
        payload = payload if call is None else on_cpu(payload)  # it is kept
        if self._run.begun is None:
            begin = self._run.begin_payload(options.get(KEY, {}))
            self._run.loads = True
            self._ask("begin", begin)
            self._run.begun = begin
        answer = self._ask("forward", payload)
        self._tell_compiled(answer)
        if call is not None:
            for name, value in answer["cache"].items():
                setattr(call, name, value)
            self._run.calls.add(payload, call)
        return on(args[0].device if isinstance(args[0], Tensor) else args[0][0].device, received(answer["output"]))

    def compute(self, payload: Mapping) -> Mapping:
        """What the run's model computes outside of its calls; payload: of `comfy_parts.computed`."""
        if self._run is None:
            raise ValueError("a sampling run of the Context-Parallel Launcher has ended; its model cannot be used on.")
        self._run.loads = True
        return self._ask("compute", self._run.settings | payload)

    def end_run(self, *, keep: bool) -> None:
        """The run has ended, however; keep: leave the weights on the ranks' devices."""
        run, self._run = self._run, None
        if run is None or not run.loads or not self.group.connected:  # new ranks know of no run
            return
        if keep and run.begun is None:  # left half-way; the next run ends it
            return
        answer = self.group.call("end", {"keep": keep}, cancelled=cancelled)
        self._tell_compiled(answer, run)

    def detached(self, patcher: ModelPatcher, unpatch_all: bool = True) -> None:
        """The host wants the memory of the model back: free the ranks' devices; the next run loads it there again.

        Not the memory of a device that no rank uses, where the host says which one it is; nor where it drops a twin of
        an earlier run, or only takes one off its list to put it there again (unpatch_all is false then).
        """
        wanted = patcher in self._watch or (patcher is self.twin and not self._is_elsewhere(patcher.load_device))
        if wanted and unpatch_all and self.group.connected and not sys.is_finalizing():
            # The twin stays: the host is walking through its list of models, from which a dropped one vanishes.
            try:
                self.group.call("unload", {}, cancelled=cancelled)
            # Not into the host's memory management, which would end its prompt thread.
            except WorkerError as error:
                logger.warning("the ranks did not free their devices: %s", error)
            except comfy.model_management.InterruptProcessingException:
                comfy.model_management.interrupt_current_processing()  # for whom it was meant: the run, if there is one

    def _tidy_soon(self) -> None:
        """The host drops a model, perhaps within a call of ours: a moment later the ranks do, too."""
        if not sys.is_finalizing():
            timer = threading.Timer(TIDY_AFTER, self.tidy)
            timer.daemon = True
            timer.start()

    def tidy(self) -> None:
        """Have the ranks forget the models that the host has dropped; in any thread, between the calls of others."""
        try:
            if not self.group.connected:  # new ranks have none of them
                return
            with self.group.turn():
                if names := self.prepared.take_dropped():
                    # Not a time to load models, and not the thread in which cancel is awaited.
                    self.group.call("forget", {"models": names}, renew=False)
        except WorkerError as error:
            logger.warning("the ranks did not free the memory of models: %s", error)

    def _watch_devices(self) -> None:
        """Those but the one where the host has the twin, or would have it, which tells by itself."""
        its_own = comfy.model_management.get_torch_device() if self.twin is None else self.twin.load_device
        self._watch.stand_on(set(self.devices) - {its_own})

    def _is_elsewhere(self, device: torch.device) -> bool:
        """Whether to make room on this device asks nothing of the ranks; the host tells of theirs by itself then."""
        return bool(self._watch.devices) and device not in self.devices

    def _tell_compiled(self, answer: Mapping, run: Run | None = None) -> None:
        option = (run or self._run).compile
        if option is not None and answer["compile"] is not None:
            found = received(answer["compile"])
            compiled = tuple(Compiled(**one) for one in found.pop("compiled"))
            option.tell(CompileReport(compiled, **found))

    def _ask(self, method: str, payload: Mapping) -> object:
        if not self._configured:
            self._configure()
        return self.group.call(method, payload, cancelled=cancelled)

    def _configure(self) -> None:
        arguments = {"arguments": pickle.dumps(vars(host_arguments))}
        if others := self.group.call("configure", arguments, cancelled=cancelled):
            logger.warning(
                "the ranks of this group were set up by a ComfyUI with another command line (%s), and keep it until "
                "they are started anew",
                ", ".join(f"--{name.replace('_', '-')}" for name in others),
            )
        self._configured = True

    def _replay(self) -> None:
        """Bring a group that has restarted to where it was."""
        if self._run is not None:
            self._run.num_restarts += 1
        self._configure()
        self.prepared.restore()
        if self.asked:
            self.group.call("begin", self._run.begun, cancelled=cancelled)
            for payload in self._run.calls.payloads() if self._run.calls is not None else ():
                self.group.call("forward", payload, cancelled=cancelled)


def cancelled() -> bool:
    """Raises, as the host's own sampling does, when a person has pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()
    return False
