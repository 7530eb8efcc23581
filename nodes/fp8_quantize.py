"""FP8 Quantize: a MODEL whose large linears hold quantized weights."""

from comfy_api.latest import io

from ..para_core.adapters.comfy_quantization import apply_quantization
from ..para_core.quantization_plan import Selection
from ..para_core.quantization_scheme import SCHEMES
from .quantization_events import send_quantization_report


class FP8Quantize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaFP8Quantize",
            display_name="FP8 Quantize",
            category="para",
            description="Halves the memory of a model's large layers; the dynamic schemes also multiply in 8 bits on "
            "GPUs that can. LoRAs keep working, in front of it and behind it.",
            search_aliases=["fp8", "int8", "nf4", "quantization", "torchao", "low vram"],
            inputs=[
                io.Model.Input("model", tooltip="A diffusion model; what is quantized already stays as it is."),
                io.Combo.Input(
                    "scheme",
                    options=["auto", *SCHEMES],
                    default="auto",
                    tooltip="dynamic: weights and activations, multiplied in 8 bits where the GPU has the units. "
                    "per_row: a scale for each row, not one for all. weight_only: less memory, not faster. int8: "
                    "closer to the original than fp8. nf4: a quarter of the memory, least exact. auto: what this "
                    "device runs.",
                ),
                io.String.Input(
                    "include",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Layers to quantize as well, as name patterns such as final_layer.* or *_mod.lin. More "
                    "layers: less memory, further from the original. Empty: the large layers inside the blocks.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Layers to leave as they are, as name patterns such as double_blocks.0.* More layers: "
                    "closer to the original, more memory. Empty: none but those that the model's family leaves.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model with quantized layers.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, scheme, include="", exclude="") -> io.NodeOutput:
        quantized, report = apply_quantization(model, scheme, Selection.of(include, exclude))
        send_quantization_report(cls.hidden.unique_id, report)
        return io.NodeOutput(quantized)
