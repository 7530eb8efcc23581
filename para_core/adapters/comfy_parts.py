"""ComfyUI: what the host uses of a diffusion model outside its forward, where the model runs in other processes.

The weights in this process are out of use then: without LoRAs, without what quantization has exchanged, off the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from types import MethodType

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from .comfy_travel import received, sendable, tensors_in

DIFFUSION_MODEL = "diffusion_model."
Ask = Callable[[Mapping], Mapping]  # payload of `computed` -> its answer from the ranks
OF_MODULES = {"__call__", "forward", "state_dict"}  # of what every module has, what can be asked for
WEIGHTS, BUFFERS = {"parameters", "named_parameters"}, {"buffers", "named_buffers"}  # and what is read here


class Part:
    """A module with weights inside a diffusion model; what computes with them is asked of the other processes."""

    def __init__(self, original: Callable[[], ModelPatcher], ask: Ask, path: str) -> None:
        """original: the MODEL. path: of the module in the diffusion model."""
        self._original, self._ask, self._path = original, ask, path

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):  # of Python's own protocols
            raise AttributeError(name)
        return attribute(self._original, self._ask, self._path, name)

    def __call__(self, *args, **kwargs) -> object:
        return computed_elsewhere(self._ask, self._path, "__call__", args, kwargs)

    def __bool__(self) -> bool:
        return True

    def __len__(self) -> int:
        return len(_part(self._original(), self._path))

    def __iter__(self) -> Iterator[object]:
        """The modules of a list of them."""
        return (getattr(self, name) for name in map(str, range(len(self))))

    def __getitem__(self, key: int | slice | str) -> object:
        return getattr(self, key) if isinstance(key, str) else [*self][key]


def attribute(original: Callable[[], ModelPatcher], ask: Ask, path: str, name: str) -> object:
    """What stands under a name in the diffusion model, or in the part at `path`, for code outside the forward.

    Methods are computed elsewhere, modules with weights are a `Part`, and a weight is its shape and dtype alone, on
    the meta device. Everything else, buffers too, needs no weights, and is the MODEL's own.
    """
    model = original()
    module, inner = _part(model, path), f"{path}.{name}".lstrip(".")
    value = getattr(module, name)
    if isinstance(value, nn.Module):
        return Part(original, ask, inner) if _has_weights(value) else value
    if name in WEIGHTS:
        return lambda *args, **kwargs: map(_shape_of, value(*args, **kwargs))
    if name in module._parameters:
        if DIFFUSION_MODEL + inner in model.patches:  # some LoRAs change the shape
            return _like(*computed_elsewhere(ask, path, name, (), {}))
        return None if value is None else _like(value.shape, value.dtype)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and name not in BUFFERS:
        return lambda *args, **kwargs: computed_elsewhere(ask, path, name, args, kwargs)
    return value


def computed_elsewhere(ask: Ask, path: str, name: str, args: tuple, kwargs: Mapping) -> object:
    """What a method of the diffusion model, or of a part of it, returns; on the device of its arguments.

    Raises ValueError for one that changes the module, and for arguments that cannot go to other processes.
    """
    called = ".".join(filter(None, (path, name.strip("_"))))
    if hasattr(nn.Module, name) and name not in OF_MODULES:
        raise ValueError(
            f"{called} of the model is used while it samples, but its weights are with the Context-Parallel Launcher's "
            "processes. Remove the node that does it, or bypass the launcher."
        )
    payload = {
        "part": path,
        "name": name,
        "args": [sendable(value, f"argument {number} of {called}") for number, value in enumerate(args)],
        "kwargs": {key: sendable(value, f"{key} of {called}") for key, value in kwargs.items()},
    }
    device = next((tensor.device for tensor in tensors_in(payload)), torch.device("cpu"))
    return on(device, received(ask(payload)["result"]))


def computed(model: nn.Module, payload: Mapping) -> dict:
    """In such a process: what `computed_elsewhere` asks for; of a weight shape and dtype."""
    args = [received(value) for value in payload["args"]]
    kwargs = {name: received(value) for name, value in payload["kwargs"].items()}
    found = getattr(model.get_submodule(payload["part"]), payload["name"])
    result = (found.shape, found.dtype) if isinstance(found, Tensor) else found(*args, **kwargs)
    return {"result": sendable(result, f"the result of {payload['part'] or 'the model'}.{payload['name']}")}


def on(device: torch.device, value: object) -> object:
    """The same with its tensors on the device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on(device, item) for key, item in value.items()}
    return type(value)(on(device, item) for item in value) if isinstance(value, (list, tuple)) else value


def _part(model: ModelPatcher, path: str) -> nn.Module:
    return model.model.diffusion_model.get_submodule(path)


def _has_weights(module: nn.Module) -> bool:
    return next(itertools.chain(module.parameters(), module.buffers()), None) is not None


def _shape_of(found: Tensor | tuple[str, Tensor]) -> Tensor | tuple[str, Tensor]:
    """A weight, or one with its name, as `attribute` gives it."""
    return (found[0], _shape_of(found[1])) if isinstance(found, tuple) else _like(found.shape, found.dtype)


def _like(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
