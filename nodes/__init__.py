"""The nodes, one thin node a file, and what the host asks a pack for."""

from pathlib import Path

import folder_paths
from comfy_api.latest import ComfyExtension, io

from .acceleration_report import AccelerationReport
from .compile_model import CompileModel
from .context_parallel_launcher import ContextParallelLauncher
from .demo_prompt import DemoPrompt
from .fbcache_patcher import FBCachePatcher
from .fp8_quantize import FP8Quantize
from .fp8_quantize_clip import FP8QuantizeCLIP
from .load_quantized_model import LoadQuantizedModel
from .parallel_vae_decode import ParallelVAEDecode
from .rank_events import add_routes

WEB_DIRECTORY = "./web"
DEMO_MODELS = Path(__file__).parent.parent / "para_core" / "demo" / "models"


class ParaAccelerate(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            FBCachePatcher,
            FP8Quantize,
            FP8QuantizeCLIP,
            LoadQuantizedModel,
            CompileModel,
            ContextParallelLauncher,
            ParallelVAEDecode,
            AccelerationReport,
            DemoPrompt,
        ]


async def comfy_entrypoint() -> ParaAccelerate:
    """Called by the host when it loads the pack."""
    for folder in ("diffusion_models", "vae"):
        folder_paths.add_model_folder_path(folder, str(DEMO_MODELS / folder))
    add_routes()
    return ParaAccelerate()
