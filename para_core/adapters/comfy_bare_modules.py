"""ComfyUI: modules without what the host's memory management keeps on them, for processes that have none of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

# What "dynamic VRAM" (comfy_aimdo; ComfyUI 0.33's default on NVIDIA) leaves on modules, also once they are unloaded.
HOST_ONLY = frozenset(
    {
        *("_v", "_v_signature", "_v_weight", "_v_bias", "_v_block", "_v_block_faulted", "_prefetch", "_comfy_graph"),
        *("_pins", "_pin_state", "dynamic_vbars", "dynamic_pins", "dynamic_patchers", "_comfy_cross_step_state"),
        *("weight_lowvram_function", "bias_lowvram_function"),  # a LoRA, which goes to the ranks by itself
    }
)


def is_dynamic(model: ModelPatcher) -> bool:
    """Whether the host leaves this model's weights in their file's dtype, and casts them when it uses them."""
    return hasattr(model, "is_dynamic") and model.is_dynamic()  # ComfyUI 0.3 has no such models


class BareStates:
    """The state of a module as a loader without that memory management leaves it: weights cast, nothing of the host's.

    dynamic: see `is_dynamic`; the weights come to the CPU then. Keeps what it has cast: a weight of two modules is one.
    """

    def __init__(self, *, dynamic: bool) -> None:
        self._dynamic = dynamic
        self._cast: dict[int, Tensor] = {}

    def __call__(self, state: Mapping[str, object]) -> dict[str, object]:
        bare = {name: value for name, value in state.items() if name not in HOST_ONLY}
        if not self._dynamic:
            return bare
        for kind in ("_parameters", "_buffers"):
            bare[kind] = {
                name: self._in_model_dtype(tensor, state.get(f"{name}_comfy_model_dtype"))
                for name, tensor in state[kind].items()
            }
        if state.get("weight_comfy_model_dtype", self) is None:
            bare["comfy_cast_weights"] = True  # made without a dtype: the host casts it to that of its input
        return bare

    def _in_model_dtype(self, tensor: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        if type(tensor) not in (Tensor, nn.Parameter):
            return tensor
        if id(tensor) not in self._cast:
            cast = tensor.detach().to(device="cpu", dtype=dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            self._cast[id(tensor)] = nn.Parameter(cast, requires_grad=False) if is_parameter else cast
        return self._cast[id(tensor)]
