"""ComfyUI: what of an object other processes of the host could not make, since it belongs to another custom node."""

from __future__ import annotations

import functools
import importlib
import pickle
import sys
from pathlib import PurePath
from types import FunctionType

from torch import Tensor, nn

from .comfy_quantized_tensor import is_quantized

# Top-level modules whose classes the host's own models are made of; beside Python's and ours.
EVERYWHERE = {"comfy", "comfy_kitchen", "einops", "numpy", "torch", "torchaudio", "torchvision"}
PLAIN_TENSORS = (Tensor, nn.Parameter)
OURS = __name__.removesuffix("adapters.comfy_foreign")  # in the host other than on a rank


def name_of_ours(value: object) -> tuple[str, str] | None:
    """What `ours` finds a class or function of this package by, in every process; None for anything else."""
    if isinstance(value, (type, FunctionType)) and value.__module__.startswith(OURS):
        return None if "<locals>" in value.__qualname__ else (value.__module__.removeprefix(OURS), value.__qualname__)
    return None


def ours(module: str, name: str) -> object:
    """Undo `name_of_ours`."""
    return functools.reduce(getattr, name.split("."), importlib.import_module(OURS + module))


def refuse_foreign(value: object) -> None:
    """Raises pickle.PicklingError for a class, a function or a tensor that is another pack's, naming both.

    The host loads packs under names that only it has. A tensor of a class of its own (of a GGUF file) would be written
    with its data, instead of being placed in shared memory; the host's quantized ones are made of plain tensors.
    """
    if isinstance(value, Tensor):
        if type(value) not in PLAIN_TENSORS and not is_quantized(value):
            raise pickle.PicklingError(f"it holds tensors of the class {_named(type(value))}, which they cannot share")
    elif isinstance(value, (type, FunctionType)) and not is_everywhere(value):
        raise pickle.PicklingError(f"it uses {_named(value)}, which they do not have")


def is_everywhere(value: type | FunctionType) -> bool:
    """Whether every process of the host finds this class or function under the same name."""
    root = value.__module__.partition(".")[0]
    return root in EVERYWHERE or root in sys.stdlib_module_names


def _named(value: type | FunctionType) -> str:
    """With where it comes from, as a person knows it."""
    module = value.__module__
    parts = PurePath(getattr(sys.modules.get(module), "__file__", None) or module).parts
    if "custom_nodes" in parts[:-1]:
        return f"{value.__qualname__} of the custom node {parts[parts.index('custom_nodes') + 1]}"
    return f"{value.__qualname__} of {module}"
