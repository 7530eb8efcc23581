"""FP8 Quantize (CLIP): text encoders that hold quantized weights."""

from comfy_api.latest import io

from ..para_core.adapters.comfy_quantization import apply_clip_quantization
from ..para_core.quantization_plan import Selection
from ..para_core.quantization_scheme import WEIGHT_ONLY
from .quantization_events import send_quantization_report


class FP8QuantizeCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaFP8QuantizeCLIP",
            display_name="FP8 Quantize (CLIP)",
            category="para",
            description="Halves the memory of text encoders (T5, CLIP, Qwen, Llama and others). LoRAs keep working.",
            search_aliases=["fp8 text encoder", "int8 text encoder", "quantize t5"],
            inputs=[
                io.Clip.Input("clip", tooltip="Text encoders; what is quantized already stays as it is."),
                io.Combo.Input(
                    "scheme",
                    options=["auto", *WEIGHT_ONLY],
                    default="auto",
                    tooltip="Only weights are quantized: less memory, not faster. int8: closer to the original than "
                    "fp8. nf4: a quarter of the memory, least exact. auto: int8.",
                ),
                io.String.Input(
                    "include",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Layers to quantize as well, as name patterns such as *.text_projection. More layers: less "
                    "memory, further from the original. Empty: the large layers inside the encoders' blocks.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Layers to leave as they are, as name patterns such as clip_l.* More layers: closer to the "
                    "original, more memory. Empty: none.",
                ),
            ],
            outputs=[io.Clip.Output(tooltip="The same text encoders with quantized layers.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip, scheme, include="", exclude="") -> io.NodeOutput:
        quantized, report = apply_clip_quantization(clip, scheme, Selection.of(include, exclude))
        send_quantization_report(cls.hidden.unique_id, report)
        return io.NodeOutput(quantized)
