"""Demo Prompt: the conditioning of the small demo model, which needs no text encoder."""

from comfy_api.latest import io

from ..para_core.demo.prompt import encode


class DemoPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaDemoPrompt",
            display_name="Demo Prompt",
            category="para/demo",
            description="Describes a picture to the small demo model that comes with this pack (coloured shapes). "
            "Other models need their own text encoder.",
            inputs=[
                io.String.Input(
                    "prompt",
                    default="a red circle top left, a blue square bottom right, on grey",
                    multiline=True,
                    tooltip="One to three shapes, each with a colour and a place, and a background. Empty: no prompt, "
                    "as the negative of a run with cfg above 1.",
                ),
            ],
            outputs=[io.Conditioning.Output(tooltip="For the sampler's positive or negative.")],
        )

    @classmethod
    def execute(cls, prompt: str) -> io.NodeOutput:
        context, pooled = encode(prompt)
        return io.NodeOutput([[context, {"pooled_output": pooled}]])
