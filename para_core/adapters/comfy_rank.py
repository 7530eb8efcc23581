"""ComfyUI on a rank: builds the models that the server has, and runs their forward for it.

Runs in a process of its own, where nothing of ComfyUI is imported before `configure` has said with which arguments.
"""

from __future__ import annotations

import functools
import gc
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ..artifact_cache import ArtifactCache
from ..attention import MeshShape
from ..compilation import Compilation
from ..compile_config import CompileConfig
from ..mesh_ranks import MeshRanks
from ..parallel_vae import parallel_decode
from .comfy_rank_arguments import rank_arguments
from .comfy_rank_meshes import RankMeshes

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from .comfy_rank_run import RankRun
    from .comfy_sharding import AttentionOnRanks


class Service:
    """What a rank does when the server asks; every method runs on all ranks with the same payload."""

    borrowing = ("forward", "decode_vae")  # they keep nothing of what they are given

    def __init__(self, context) -> None:
        """context: the rank's place in the group (rank, world_size, device), as para_core.workers gives it."""
        self.context = context
        self._models: dict[str, ModelPatcher] = {}
        self._quantized: dict[str, tuple[str, ModelPatcher]] = {}  # of models, by what the server calls it
        self._variants: dict[tuple[str, str], ModelPatcher] = {}
        self._meshes = RankMeshes(context.device.type)
        self._vae: tuple[str, ModelPatcher] | None = None
        self._run: RankRun | None = None
        self._run_of: str | None = None  # the model of the latest run
        self._compilations: dict[tuple[str, CompileConfig], Compilation] = {}
        self._attention: AttentionOnRanks | None = None

    def configure(self, payload: Mapping) -> list[str]:
        """Take over the server's command line, and import ComfyUI. arguments: its pickled namespace, as a dict.

        Returns the names of those that are otherwise here, where another server has been before.
        """
        from comfy.cli_args import args

        wanted = rank_arguments(pickle.loads(payload["arguments"]), self.context.device)
        if "comfy.model_management" in sys.modules:
            return sorted(name for name, value in wanted.items() if getattr(args, name, None) != value)
        vars(args).update(wanted)
        if self.context.device.type == "cuda":
            torch.cuda.set_device(self.context.device)
            # Loaders cast weights on the CPU, which one thread takes half a minute for.
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // self.context.world_size))
        import comfy.model_management  # noqa: F401
        import comfy.sd  # noqa: F401

        return []

    def load(self, payload: Mapping) -> dict:
        """Build a model under the id that the server gives it: by its loader's recipe, or from a packed module.

        keep: those that the server counts on; others are of a client that is gone, or of a load that was left. So is
        what was made of this one.
        """
        from .comfy_rank_models import from_module, from_recipe
        from .comfy_shared_weights import private_bytes

        name = payload["model"]
        self.forget({"models": self._models.keys() - {name, *payload["keep"]}})
        self._drop_variants(name)
        self._quantized.pop(name, None)
        if name not in self._models:
            if payload["recipe"] is not None:
                found = from_recipe(payload["recipe"])
            else:
                found = from_module(payload["module"], payload["tensors"], self.context.device)
            self._models[name] = found
        return {"private_bytes": private_bytes(self._models[name])}

    def missing(self, payload: Mapping) -> dict:
        """Of each rank, how many bytes of a model's weights are not on its device; None without such a model."""
        from .comfy_rank_models import missing_bytes

        model = self._models.get(payload["model"])
        _, model = self._quantized.get(payload["model"], ("", model))
        return {"bytes": None if model is None else missing_bytes(model)}

    def forget(self, payload: Mapping) -> None:
        """Free these models, a VAE's too, here and on the device."""
        from .comfy_rank_memory import give_back
        from .comfy_unload import unload

        for name in payload["models"]:
            self._drop_variants(name)
            self._quantized.pop(name, None)
            if name in self._models:
                unload(self._models.pop(name))
            for key in [key for key in self._compilations if key[0] == name]:
                del self._compilations[key]
            if self._vae is not None and self._vae[0] == name:
                unload(self._vae[1])
                self._vae = None
        if payload["models"]:
            gc.collect()  # a patcher and its model refer to each other
            give_back()

    def load_vae(self, payload: Mapping) -> None:
        """Take over the model of a VAE, in the place of the one before."""
        from .comfy_rank_models import from_module

        self._vae = payload["model"], from_module(payload["module"], payload["tensors"], self.context.device)

    def decode_vae(self, payload: Mapping) -> dict:
        """Decode a latent on all ranks; rank 0 returns all of it.

        memory: of this rank's activations, in bytes. whole: this VAE cannot run with a part of it on the device.
        """
        import comfy.model_management

        from .comfy_rank_memory import give_back
        from .comfy_travel import received

        name, patcher = self._vae
        assert name == payload["model"]
        whole = payload["whole"]
        comfy.model_management.load_models_gpu([patcher], memory_required=payload["memory"], force_full_load=whole)
        options = {name: received(value) for name, value in payload["options"].items()}
        decode = functools.partial(patcher.model.diffusion_model.decode, **options)
        images = parallel_decode(decode, payload["samples"], destination=0)
        give_back()  # as after a run
        return {"images": images}

    def quantize(self, payload: Mapping) -> None:
        """Give a loaded model these quantized weights in the place of others; without any, its own."""
        from .comfy_rank_models import with_quantized

        name, quantization = payload["model"], payload["quantization"]
        if self._quantized.get(name, ("", None))[0] == quantization:
            return
        self._drop_variants(name)
        self._quantized.pop(name, None)
        if payload["layers"]:
            quantized = with_quantized(self._models[name], payload["layers"], payload["tensors"])
            self._quantized[name] = quantization, quantized

    def patch(self, payload: Mapping) -> dict:
        """Make a variant of a loaded model, quantized or not, with LoRAs; others of its kind are dropped."""
        from .comfy_rank_models import with_patches
        from .comfy_shared_weights import private_bytes

        name = payload["model"], payload["variant"]
        if name not in self._variants:
            self._drop_variants(name[0])
            _, model = self._quantized.get(name[0], ("", self._models[name[0]]))
            self._variants[name] = with_patches(model, payload)
        return {"private_bytes": private_bytes(self._variants[name])}

    def _drop_variants(self, model: str) -> None:
        """And let go of their weights on the device; they end a run of theirs."""
        from .comfy_unload import unload

        if self._run_of == model:
            self._end_run()
        for key in [key for key in self._variants if key[0] == model]:
            unload(self._variants.pop(key))

    def begin(self, payload: Mapping) -> None:
        """Start a sampling run: load the variant onto this rank's device, and set the run's accelerations up."""
        from .comfy_attention import chosen_attention
        from .comfy_rank_run import RankRun
        from .comfy_sharding import AttentionOnRanks

        self.end({})
        patcher = self._variants[payload["model"], payload["variant"]]
        attention = chosen_attention()

        def ranks(sizes: tuple[int, int, int]) -> MeshRanks:
            return MeshRanks(self._meshes.of(MeshShape(*sizes)), attention)

        self._attention = self._attention or AttentionOnRanks()
        compilation = None if payload["compile"] is None else self._compilation(payload["model"], payload["compile"])
        self._run_of = payload["model"]
        self._run = RankRun(patcher, payload, ranks=ranks, attention=self._attention, compilation=compilation)

    def forward(self, payload: Mapping) -> dict:
        """One model call; every rank returns its whole output."""
        return self._run.forward(payload)

    def compute(self, payload: Mapping) -> dict:
        """What a variant computes outside of model calls, on every rank; its run may have begun, or follows."""
        from .comfy_rank_run import compute_before_run

        if self._run is not None and self._run_of == payload["model"]:
            return self._run.compute(payload)
        self._end_run()
        return compute_before_run(self._variants[payload["model"], payload["variant"]], payload)

    def _compilation(self, model: str, settings: Mapping) -> Compilation:
        """What has been compiled for a model; ranks keep artifacts apart, since each writes its own."""
        key = model, CompileConfig(**settings["config"])
        if key not in self._compilations:
            rank = f"rank{self.context.rank}_of_{self.context.world_size}"
            directory = None if settings["directory"] is None else Path(settings["directory"], rank)
            cache = None if directory is None else ArtifactCache(directory, self.context.device)
            self._compilations[key] = Compilation(key[1], cache)
        return self._compilations[key]

    def end(self, payload: Mapping) -> dict:
        """End the run; with keep False, free this rank's device too."""
        report = self._end_run()
        if not payload.get("keep", True):
            self.unload(payload)
        return {"compile": report}

    def _end_run(self) -> dict | None:
        """And give its activations' memory back: the server counts what is free on the device, as when it decodes."""
        from .comfy_rank_memory import give_back

        if self._run is None:
            return None
        run, self._run = self._run, None
        report = run.end()
        del run
        give_back()
        return report

    def unload(self, payload: Mapping) -> None:
        """Free this rank's device, on which the next call of a run loads anew."""
        import comfy.model_management

        from .comfy_rank_memory import give_back

        if self._run is not None:
            self._run.leave_device()
        comfy.model_management.unload_all_models()
        give_back()
