"""FBCache Patcher: the first-block cache on a MODEL wire."""

from comfy_api.latest import io

from ..para_core.adapters.comfy_fbcache import apply_fbcache
from ..para_core.residual_cache import DECISIONS, DEVICES, MAX_ORDER, CacheConfig
from .events import send_report


class FBCachePatcher(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaFBCachePatcher",
            display_name="FBCache Patcher",
            category="para",
            description="Runs only the first block of a step whose result would hardly differ from the last one's, and "
            "reuses what the other blocks did then. Works with any sampler, LoRA and ControlNet.",
            inputs=[
                io.Model.Input("model", tooltip="A diffusion transformer; the node lists what it supports."),
                io.Float.Input(
                    "residual_diff_threshold",
                    default=-1.0,
                    min=-1.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much may differ (see decision) while a step is still reused. Higher: faster, "
                    "further from the original. 0: never reuse. -1: the recommended value of the connected model.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps before this part of the denoising are always computed. Higher: closer to the "
                    "original composition, slower. 0: reuse from the start.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Steps behind this part of the denoising are always computed. Lower: closer to the "
                    "original details, slower. 0: never reuse.",
                ),
                io.Int.Input(
                    "warmup_steps",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="This many steps at the start are always computed. Higher: closer to the original, slower.",
                ),
                io.Int.Input(
                    "max_consecutive_hits",
                    default=0,
                    min=0,
                    max=1000,
                    tooltip="After this many reused steps in a row one is computed. Lower: closer to the original, "
                    "slower. 0: no limit.",
                ),
                io.Combo.Input(
                    "decision",
                    optional=True,
                    options=list(DECISIONS),
                    default="prediction",
                    tooltip="What is held against the threshold. prediction: how wrong the reused result would be; "
                    "closer to the original at the same speed. first_block: how much the first block's result has "
                    "changed, the published first-block cache.",
                ),
                io.Int.Input(
                    "order",
                    optional=True,
                    default=1,
                    min=0,
                    max=MAX_ORDER,
                    tooltip="How the skipped result is continued over the computed steps: 1 along a line, 2 along a "
                    "parabola; usually closer to the original. 0: the last one is repeated.",
                ),
                io.Float.Input(
                    "target_speedup",
                    optional=True,
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=0.1,
                    tooltip="Instead of a threshold (leave that at -1): how many times fewer blocks to run, for "
                    "example 2. Higher: faster, further from the original. 0: use the threshold.",
                ),
                io.Combo.Input(
                    "residual_device",
                    optional=True,
                    options=list(DEVICES),
                    default="model",
                    tooltip="Where results are kept between steps. model: on the model's device. cpu: in CPU memory, "
                    "which frees memory of the GPU and costs a copy at each step; the picture is the same.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, sampling with the cache.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls, model, residual_diff_threshold, decision="prediction", order=1, target_speedup=0.0, **settings
    ) -> io.NodeOutput:
        threshold = None if residual_diff_threshold == -1 else residual_diff_threshold
        config = CacheConfig(threshold, decision=decision, order=order, target_speedup=target_speedup, **settings)
        return io.NodeOutput(apply_fbcache(model, config, listener=send_report(cls.hidden.unique_id)))
