"""Load Quantized Model: a MODEL from a file that was saved behind FP8 Quantize."""

import folder_paths
from comfy_api.latest import io

from ..para_core.adapters.comfy_quantization import quantization_reports
from ..para_core.adapters.comfy_quantized_model import load_quantized_model
from .quantization_events import send_quantization_report

FOLDER = "diffusion_models"  # the host's; it looks into output/diffusion_models too, where Save Model writes


class LoadQuantizedModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaLoadQuantizedModel",
            display_name="Load Quantized Model",
            category="para",
            description="Loads a model that was saved behind FP8 Quantize: the same pictures, and only the quantized "
            "weights in memory.",
            search_aliases=["fp8 loader", "int8 loader", "nf4 loader", "load fp8 model"],
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file that Save Model wrote behind FP8 Quantize, from models/diffusion_models or "
                    "output/diffusion_models.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The quantized model as it was saved; LoRAs go behind it.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model_name) -> io.NodeOutput:
        model = load_quantized_model(folder_paths.get_full_path_or_raise(FOLDER, model_name))
        send_quantization_report(cls.hidden.unique_id, quantization_reports(model)[0])
        return io.NodeOutput(model)
