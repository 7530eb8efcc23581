"""ComfyUI: what of a MODEL and of a model call can go to another process, and in what form."""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from .comfy_bare_modules import BareStates
from .comfy_foreign import name_of_ours, ours, refuse_foreign
from .comfy_options import KEY
from .comfy_quantized_model import load_quantized_model

PLAIN = (type(None), bool, int, float, str, bytes, Tensor)
# What the host puts into transformer_options for its own process only.
STAYS = {KEY, "wrappers", "callbacks", "uuids", "prefetch_dynamic_vbars", "context_window", "multigpu_thread_device"}
STAYS |= {"easycache"}  # LazyCache's, which works around the model; EasyCache is refused as a wrapper inside it
# Code of other packs (and of some of the host's own nodes) that wants to run inside the model.
CODE = {"patches", "patches_replace", "optimized_attention_override"}
# Wrappers of these kinds run around the forward, where a rank would have to call them.
INSIDE_MODEL = ("diffusion_model",)


class TensorsAside(pickle.Pickler):
    """Pickles an object without its tensors, which it collects in `tensors`, each of them once.

    Modules are bare, see `BareStates`; what the ranks could not make is refused, see `refuse_foreign`.
    """

    def __init__(self, file: io.BytesIO, *, dynamic: bool = False) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}
        self._bare = BareStates(dynamic=dynamic)

    def reducer_override(self, value: object) -> object:
        if not isinstance(value, nn.Module):
            return NotImplemented
        make, arguments, *rest = value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
        if rest and isinstance(rest[0], dict):
            rest[0] = self._bare(rest[0])
        return make, arguments, *rest

    def persistent_id(self, value: object) -> tuple[int, bool] | tuple[str, str] | None:
        if (name := name_of_ours(value)) is not None:
            return name
        refuse_foreign(value)  # before anything of it is packed
        if type(value) not in (Tensor, nn.Parameter):
            return None
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.tensors)
            self.tensors.append(value.detach())
        return self._numbers[id(value)], isinstance(value, nn.Parameter)


class WithTensors(pickle.Unpickler):
    """Undoes `TensorsAside`; the object uses the given tensors themselves."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: tuple[int, bool] | tuple[str, str]) -> object:
        if isinstance(number[0], str):
            return ours(*number)
        tensor = self._tensors[number[0]]
        return nn.Parameter(tensor, requires_grad=False) if number[1] else tensor


def pack(value: object, *, dynamic: bool = False) -> tuple[bytes, list[Tensor]]:
    """The object as bytes and the tensors in it. Raises pickle.PicklingError, or what its parts raise, where it fails.

    dynamic: of modules whose weights the host casts on use, as cast; see `is_dynamic`.
    Only for the authenticated channel to our own ranks: unpacking runs code.
    """
    file = io.BytesIO()
    pickler = TensorsAside(file, dynamic=dynamic)
    pickler.dump(value)
    return file.getvalue(), pickler.tensors


def pack_to_send(value: object, name: str, remedy: str, *, dynamic: bool = False) -> tuple[bytes, list[Tensor]]:
    """`pack` for the ranks. Raises ValueError for what cannot go there, by the name and with the remedy given."""
    try:
        return pack(value, dynamic=dynamic)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{name} cannot go to other processes: {error}. {remedy}, or do without the other processes."
        ) from error


def pack_module(module: nn.Module, *, dynamic: bool) -> tuple[bytes, list[Tensor]]:
    """`pack_to_send` for a model, or a part of one. dynamic: see `is_dynamic`."""
    name, remedy = f"this model ({type(module).__name__})", "Load it with ComfyUI's own loader"
    return pack_to_send(module, name, remedy, dynamic=dynamic)


def unpack(packed: bytes, tensors: list[Tensor]) -> object:
    """What `pack` was given, over `tensors`."""
    return WithTensors(io.BytesIO(packed), tensors).load()


def recipe_of(model: ModelPatcher) -> tuple[str, bytes] | None:
    """How the host's own loaders build this model once more: what it is identified by, and the packed recipe.

    None where the loader left none, or one that another process cannot follow.
    """
    recipe = getattr(model, "cached_patcher_init", None)  # ComfyUI 0.3 sets none
    if recipe is None or not (recipe[0] is load_quantized_model or recipe[0].__module__.startswith("comfy.")):
        return None
    try:
        packed, tensors = pack(recipe)
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    if tensors:
        return None
    files = [Path(value) for value in recipe[1] if isinstance(value, str) and Path(value).is_file()]
    state = [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files]
    return hashlib.sha256(packed + repr(state).encode()).hexdigest(), packed


def refuse_code(options: Mapping[str, object]) -> None:
    """Raises ValueError for code of another pack that would have to run on a rank, by the name it was put in as."""
    for kind in CODE & options.keys():
        if names := _names(options[kind]):
            raise ValueError(
                f"a node patches the inside of the model ({kind}: {names}), which the Context-Parallel Launcher's "
                "processes cannot run. Remove that node, or bypass the launcher."
            )
    for kind in INSIDE_MODEL:
        if keys := sorted(map(str, {key for key, found in options.get("wrappers", {}).get(kind, {}).items() if found})):
            raise ValueError(
                f"a node wraps the diffusion model ({', '.join(keys)}), which the Context-Parallel Launcher's "
                "processes cannot run. Remove that node (EasyCache: use the FBCache Patcher), or bypass the launcher."
            )


def sendable_options(options: Mapping[str, object]) -> dict[str, object]:
    """The transformer options that a model reads on a rank, as plain data. Raises ValueError as `refuse_code`."""
    refuse_code(options)
    left = {key: value for key, value in options.items() if key not in STAYS | CODE}
    return {key: sendable(value, f"transformer option {key}") for key, value in left.items()}


def sendable(value: object, name: str) -> object:
    """Plain data, with sets and tuples marked so that `received` gives them back. Raises ValueError naming `name`."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, torch.Size):
        return {"": "tuple", "items": list(value)}
    if type(value) in (list, tuple, set, frozenset):
        return {"": type(value).__name__, "items": [sendable(item, name) for item in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"": "dict", "items": {key: sendable(item, name) for key, item in value.items()}}
    if isinstance(value, torch.dtype):
        return {"": "dtype", "items": str(value).removeprefix("torch.")}
    raise ValueError(
        f"{name} is a {type(value).__name__}, which cannot go to the Context-Parallel Launcher's processes. "
        "Bypass the launcher, or remove the node that adds it."
    )


KINDS = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def received(value: object) -> object:
    """What `sendable` was given."""
    if not isinstance(value, Mapping):
        return value
    kind, items = value[""], value["items"]
    if kind == "dict":
        return {key: received(item) for key, item in items.items()}
    if kind == "dtype":
        return getattr(torch, items)
    return KINDS[kind](received(item) for item in items)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Those in sendable data, in its order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_in(item)


def _names(found: object) -> str:
    """What stands behind a kind of patch; empty where nothing does."""
    if isinstance(found, Mapping):
        return ", ".join(f"{key}" for key, inner in found.items() if inner)
    return getattr(found, "__name__", type(found).__name__) if found is not None else ""
