"""ComfyUI's "dynamic VRAM", its default on NVIDIA, on the CPU: all of it that needs no device memory of its own."""

from __future__ import annotations

import ctypes

import pytest
import torch
from tiny_models import host_version


class Unpicklable:
    """As what comfy_aimdo hands out: it stands for memory of this process."""

    size = 0

    def __init__(self, *args: object) -> None:
        pass

    def truncate(self, *args: object, **settings: object) -> None:
        pass

    def __reduce_ex__(self, protocol: int) -> None:
        raise TypeError(f"cannot pickle {type(self).__name__}")


@pytest.fixture
def dynamic_vram(comfy, monkeypatch):
    """From here on the host loads models with it; the class of their patchers."""
    if host_version() < (0, 33):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    import comfy.model_patcher
    import comfy_aimdo.host_buffer

    class Dynamic(comfy.model_patcher.ModelPatcherDynamic):
        """Loads as the host's own does; the marks of an address in device memory, which the CPU has not, are added."""

        def __new__(cls, *args, **settings):
            return object.__new__(cls)

        def load(self, *args, **settings) -> None:
            super().load(*args, **settings)
            vbar = Unpicklable()
            for name, module in self.model.named_modules():
                weight = getattr(module, "weight", None) if hasattr(module, "comfy_cast_weights") else None
                if weight is not None and f"{name}.weight" not in self.backup:
                    module._v = vbar, 1 << 40, 512
                    module._v_signature = (ctypes.c_uint32 * 3)()
                    module._v_weight = torch.full_like(weight, torch.nan)

        def partially_unload(self, device_to, memory_to_free=0, force_patch_weights=False) -> int:
            return self.restore_loaded_backups()

    monkeypatch.setattr(comfy_aimdo.host_buffer, "HostBuffer", Unpicklable)
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
    yield Dynamic
    comfy.model_management.unload_all_models()
