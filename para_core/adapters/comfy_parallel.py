"""ComfyUI: a MODEL whose forward runs on a group of ranks, the sampler and everything around it as ever."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import comfy.model_management
import comfy.sampler_helpers
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from torch import Tensor

from ..attention import MeshShape, choose_mesh, require_lse
from ..families import family_of
from ..parallel_config import ParallelConfig
from ..parallel_notice import ParallelNotice
from ..parallel_report import ParallelReport, RankReport
from ..sharded_call import sharding_obstacle
from .comfy_attention import chosen_attention
from .comfy_call_mesh import CallMeshes
from .comfy_options import WRAPPERS, attach, diffusion_model_of, option_of
from .comfy_refusals import refuse, refuse_combinations, refuse_without_ranks
from .comfy_room import make_room
from .comfy_session import Session
from .comfy_stand_in import PARALLEL, Twin, twin_of
from .comfy_unload import unload

logger = logging.getLogger(__name__)
NAME = PARALLEL
HEADS = ("num_heads", "n_heads", "n_local_heads", "heads", "num_attention_heads")


@dataclass
class ParallelLog:
    """The report of the latest run of a MODEL that ended well; all clones behind one launcher share it."""

    report: ParallelReport | None = None


@dataclass(frozen=True)
class ParallelOption:
    """What the Context-Parallel Launcher leaves on a MODEL.

    num_heads: of its attention. session: the one of the group for a config, started where there is none yet.
    listener: told what a run uses.
    """

    config: ParallelConfig
    num_heads: int
    session: Callable[[ParallelConfig], Session]
    listener: Callable[[ParallelNotice], None] | None = None
    log: ParallelLog = field(default_factory=ParallelLog)

    def mesh(self, world_size: int, num_rows: int, num_conditionings: int = 1) -> MeshShape:
        """How the ranks share a call of so many rows. Raises ValueError for degrees that the model does not allow."""
        rows = {"num_rows": num_rows, "num_conditionings": num_conditionings}
        return choose_mesh(world_size, num_heads=self.num_heads, request=self.config.mesh, **rows)

    def __deepcopy__(self, memo: dict) -> ParallelOption:
        return self  # ComfyUI 0.3 copies options with every clone, down to the group's sockets


def apply_parallel(
    model: ModelPatcher,
    config: ParallelConfig,
    session: Callable[[ParallelConfig], Session],
    *,
    listener: Callable[[ParallelNotice], None] | None = None,
) -> ModelPatcher:
    """A clone of `model` that samples on the devices of `config`; `model` itself is not changed.

    Starts nothing: the group starts with the first sampling run. Raises ValueError for a model that cannot be spread,
    and for a mesh that does not fit it.
    """
    diffusion_model = diffusion_model_of(model.model)
    family = family_of(diffusion_model)
    if (obstacle := sharding_obstacle(diffusion_model, family)) is not None:
        raise ValueError(
            f"{type(diffusion_model).__name__} cannot run on several devices: {obstacle}. "
            "Bypass the Context-Parallel Launcher for this model."
        )
    blocks = [block for stack in family.stacks for block in stack.blocks_in(diffusion_model)]
    option = ParallelOption(config, num_heads_of(blocks), session, listener)
    if config.devices:
        option.mesh(len(config.devices), 2 * len(config.devices))
    wrappers = {WRAPPERS.OUTER_SAMPLE: _outer_sample, WRAPPERS.PREPARE_SAMPLING: _prepare_sampling}
    clone = attach(model, NAME, option, wrappers)
    clone.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, NAME)
    clone.add_callback_with_key(CallbacksMP.ON_PRE_RUN, NAME, refuse_without_ranks)
    return clone


def parallel_option(model: ModelPatcher) -> ParallelOption | None:
    """What the launcher left on this MODEL, or None."""
    return option_of(model, NAME)


def last_parallel_report(model: ModelPatcher) -> ParallelReport | None:
    """The report of this MODEL's latest run on ranks; None before there was one, or without the launcher."""
    option = parallel_option(model)
    return None if option is None else option.log.report


def num_heads_of(blocks: list) -> int:
    """Attention heads of a model's blocks, by what their attention modules call it; 1 where none says."""
    for module in (module for block in blocks for module in block.modules()):
        for name in HEADS:
            if isinstance(found := getattr(module, name, None), int):
                return found
    return 1


def _outer_sample(executor, noise, *args, **kwargs):
    """Let the run sample with a twin of the MODEL whose forward the ranks compute."""
    guider = executor.class_obj
    model: ModelPatcher = guider.model_patcher
    option: ParallelOption = option_of(guider, NAME)
    refuse(model)
    refuse_combinations(guider)
    session = option.session(option.config)
    mesh = option.mesh(session.world_size, *_num_rows(guider, noise))
    meshes = CallMeshes(option.num_heads, option.config.mesh, mesh, partial(_tell, option, session))
    _refuse_attention(meshes, noise)
    # Neither a second copy on the device that rank 0 needs, nor weights with another run's LoRA in them.
    unload(model)
    memory = comfy.sampler_helpers.estimate_memory(model, noise.shape, guider.conds)[0] / mesh.world_size
    # Before the ranks build it: some of the host's loaders put a model on the device at once.
    make_room(model, session, missing=session.missing(model), memory=memory, conds=guider.conds)
    names = session.prepare(model)
    twin = session.twin = twin_of(model, session.forward, session.compute, devices=session.devices)
    twin.add_callback_with_key(CallbacksMP.ON_DETACH, NAME, session.detached)
    session.start_run({**names, "memory": memory}, meshes)
    session.mesh = str(mesh)
    guider.model_patcher = twin
    try:
        samples = executor(noise, *args, **kwargs)
        if not session.asked:
            _say(option, ParallelNotice("not_asked", mesh.world_size, session.mesh), logging.WARNING)
        option.log.report = _report(session)
        return samples
    finally:
        guider.model_patcher = model
        session.end_run(keep=option.config.keep_loaded)


def _prepare_sampling(executor, model, *args, **kwargs):
    """Have the host make room on its device for what is computed there."""
    with model.in_preparation() if isinstance(model, Twin) else nullcontext():
        return executor(model, *args, **kwargs)


def _tell(option: ParallelOption, session: Session, mesh: MeshShape) -> None:
    session.mesh = str(mesh)
    _say(option, ParallelNotice("ranks", mesh.world_size, session.mesh, session.replaced))


def _refuse_attention(meshes: CallMeshes, noise: Tensor) -> None:
    """Raises ValueError where a call may need a ring that the host's choice of attention cannot serve."""
    rows = range(1, 2 * noise.shape[0] + 1)
    if any(mesh.ring > 1 for mesh in (meshes.planned, *map(meshes.choose, rows))):
        require_lse(chosen_attention())


def _report(session: Session) -> ParallelReport:
    """Of the run that is about to end: the ranks may let go of their memory then."""
    ranks = tuple(RankReport(rank["device"], rank["memory_bytes"]) for rank in session.group.state()["ranks"])
    return ParallelReport(session.mesh, ranks, session.num_restarts, session.asked)


def _say(option: ParallelOption, notice: ParallelNotice, level: int = logging.INFO) -> None:
    logger.log(level, "Context parallel: %s", notice.text())
    if option.listener is not None:
        option.listener(notice)


def _num_rows(guider: object, noise: Tensor) -> tuple[int, int]:
    """Rows and conditionings of a model call, as far as can be known: the host batches those of equal shapes."""
    shapes = {
        name: [getattr(cond.get("cross_attn"), "shape", None) for cond in found] for name, found in guider.conds.items()
    }
    together = getattr(guider, "cfg", 1.0) != 1.0 and shapes.get("positive") == shapes.get("negative", ())
    num_conditionings = 2 if together else 1
    return noise.shape[0] * num_conditionings, num_conditionings
