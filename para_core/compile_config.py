"""How a model is compiled, and whether this machine can."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SCOPES = ("blocks", "model")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
DYNAMIC = ("auto", "on", "off")
# Fixed, so that a workflow can name no other callable. The last two generate no code: they are for finding faults.
BACKENDS = ("inductor", "cudagraphs", "aot_eager", "eager")


@dataclass(frozen=True)
class CompileConfig:
    """Settings of a compilation.

    dynamic: auto compiles for the first size exactly and for any other size once (scope model: for each size anew); on:
        once for any size, as far as the code allows; off: for each size anew. mode: of inductor. allow_uncompiled: run
        as it is what cannot be compiled, instead of raising.
    """

    scope: str = "blocks"
    mode: str = "default"
    dynamic: str = "auto"
    fullgraph: bool = False
    backend: str = "inductor"
    allow_uncompiled: bool = False

    def __post_init__(self) -> None:
        choices = {"scope": SCOPES, "mode": MODES, "dynamic": DYNAMIC, "backend": BACKENDS}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(allowed)}: choose one.")
        if self.mode != "default" and self.backend != "inductor":
            raise ValueError(
                f"mode is {self.mode!r} with backend {self.backend!r}; modes are inductor's: choose mode default, or "
                "backend inductor."
            )

    @property
    def reuses_outputs(self) -> bool:
        """Whether a later call may write over what an earlier one returned (CUDA graphs)."""
        return self.backend == "cudagraphs" or self.mode in ("reduce-overhead", "max-autotune")


def compile_obstacle(config: CompileConfig, device: torch.device) -> str | None:
    """Why nothing can be compiled for `device`, with what to do about it; None where it can."""
    if config.backend == "cudagraphs" and device.type != "cuda":
        return f"backend cudagraphs needs an NVIDIA or AMD GPU, the model is on {device.type}; choose inductor"
    if config.backend != "inductor":
        return None
    return _no_cpp_compiler() if device.type == "cpu" else _no_triton(device)


def _no_cpp_compiler() -> str | None:
    from torch._inductor.cpp_builder import get_cpp_compiler  # heavy, and only needed here

    try:
        get_cpp_compiler()
    except RuntimeError:  # InvalidCxxCompiler
        return "no C++ compiler was found; install one (apt install g++; on Windows: Visual Studio Build Tools)"
    return None


def _no_triton(device: torch.device) -> str | None:
    from torch.utils._triton import has_triton

    if device.type != "mps" and not has_triton():
        return f"Triton for {device.type} was not found; install it (pip install triton; on Windows: triton-windows)"
    return None
