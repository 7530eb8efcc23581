"""Context-Parallel Launcher: a MODEL whose forward runs on several devices at once."""

from functools import partial

from comfy_api.latest import io

from ..para_core.adapters.comfy_parallel import apply_parallel
from ..para_core.parallel_config import BATCH_PARALLEL, ParallelConfig, check_alone
from ..para_core.parallel_notice import ParallelNotice
from . import rank_inputs
from .rank_events import GROUPS, send_notice


class ContextParallelLauncher(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaContextParallelLauncher",
            display_name="Context-Parallel Launcher",
            category="para",
            description="Runs one image or video on several GPUs: each holds the whole model and computes a part of "
            "the tokens. Works with any sampler, with LoRAs and ControlNets; the picture stays the same. Nodes that "
            "patch the inside of the model are refused by name.",
            search_aliases=["multi gpu", "context parallel", "sequence parallel", "ulysses", "ring attention", "xdit"],
            inputs=[
                io.Model.Input("model", tooltip="A diffusion transformer; the node lists what it supports."),
                rank_inputs.num_devices(
                    "How many devices compute together. More: faster, as long as the image has many tokens. "
                    "0: all of this machine. 1: nothing changes."
                ),
                rank_inputs.devices(),
                io.Int.Input(
                    "ring_degree",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Into how many parts the sequence is cut for ring attention, where keys and values travel "
                    "around. Any number of heads; moves more data. 0: chosen for the model.",
                ),
                io.Int.Input(
                    "ulysses_degree",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Over how many devices the heads are spread in attention (Ulysses). Must divide its "
                    "number of heads; usually the faster way. 0: chosen for the model.",
                ),
                io.Combo.Input(
                    "batch_parallel",
                    options=list(BATCH_PARALLEL),
                    default="auto",
                    tooltip="Whether positive and negative prompt are computed on different halves of the devices. "
                    "Helps at cfg above 1. auto: where the rows of the batch divide.",
                ),
                rank_inputs.backend(),
                rank_inputs.attach_to(),
                io.Boolean.Input(
                    "keep_loaded",
                    default=True,
                    tooltip="On: the weights stay on the devices after a run, and the next one starts at once. Off: "
                    "they leave after each run, which frees memory and costs time.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="The same model, running on all these devices.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model, num_devices, devices, attach_to, **settings) -> io.NodeOutput:
        node_id, address = cls.hidden.unique_id, attach_to.strip()
        chosen = rank_inputs.requested_devices(num_devices, devices, address)
        config = ParallelConfig(chosen, attach_to=address, **settings)
        if len(chosen) == 1:
            check_alone(config, devices, model.load_device)
            send_notice(node_id, ParallelNotice("one_device"))
            return io.NodeOutput(model)
        return io.NodeOutput(apply_parallel(model, config, GROUPS.session, listener=partial(send_notice, node_id)))
