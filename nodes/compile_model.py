"""Compile Model: torch.compile on a MODEL wire."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..para_core.adapters.comfy_compile import apply_compile
from ..para_core.compile_config import BACKENDS, DYNAMIC, MODES, SCOPES, CompileConfig
from .compile_events import send_compile_report

ARTIFACTS = ("para_accelerate", "compiled")  # in ComfyUI's user folder


class CompileModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaCompileModel",
            display_name="Compile Model",
            category="para",
            description="Compiles the model's blocks with torch.compile when it first runs; later runs and restarts "
            "reuse the result. Works with any sampler, LoRA, ControlNet and the other nodes of this pack.",
            search_aliases=["torch.compile", "torch compile", "inductor", "compile blocks", "speed up"],
            inputs=[
                io.Model.Input("model", tooltip="A diffusion transformer; with scope model any diffusion model."),
                io.Combo.Input(
                    "scope",
                    options=list(SCOPES),
                    default="blocks",
                    tooltip="blocks: each kind of block once; compiles quickly and keeps the FBCache Patcher's "
                    "decisions. model: everything in one piece; compiles longer, and not with the FBCache Patcher.",
                ),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="default",
                    tooltip="How hard inductor tries. max-autotune: measures variants of each kernel, compiles longer. "
                    "reduce-overhead: CUDA graphs, less overhead in small pictures; needs more memory.",
                ),
                io.Combo.Input(
                    "dynamic",
                    options=list(DYNAMIC),
                    default="auto",
                    tooltip="auto: the first picture size is compiled for exactly, all others together once (scope "
                    "model: each anew). on: one compilation for any size. off: each size and prompt length anew.",
                ),
                io.Boolean.Input(
                    "fullgraph",
                    default=False,
                    tooltip="Refuse a block that cannot be compiled in one piece, instead of compiling it in parts.",
                ),
                io.Combo.Input(
                    "backend",
                    options=list(BACKENDS),
                    default="inductor",
                    tooltip="inductor: generates code. cudagraphs: records kernels only. aot_eager, eager: not "
                    "faster, to find faults.",
                ),
                io.Boolean.Input(
                    "allow_uncompiled",
                    default=False,
                    optional=True,
                    tooltip="Where there is no compiler (no g++, no Triton) or a block cannot be compiled: run it as "
                    "it is, instead of stopping with an error.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, running compiled code.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, **settings) -> io.NodeOutput:
        directory = Path(folder_paths.get_user_directory(), *ARTIFACTS)
        listener = send_compile_report(cls.hidden.unique_id)
        return io.NodeOutput(apply_compile(model, CompileConfig(**settings), directory=directory, listener=listener))
