"""Parallel VAE Decode: an image or a video decoded on several devices at once."""

from functools import partial

from comfy_api.latest import io

from ..para_core.adapters.comfy_parallel_vae import parallel_vae_decode
from ..para_core.parallel_config import ParallelConfig, check_alone
from ..para_core.parallel_notice import ParallelNotice
from . import rank_inputs
from .rank_events import GROUPS, send_notice


class ParallelVAEDecode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ParaParallelVAEDecode",
            display_name="Parallel VAE Decode",
            category="para",
            description="Decodes one image or video on several GPUs: each computes a part of the picture, without "
            "seams. Uses the processes of a Context-Parallel Launcher, as long as nothing else is chosen.",
            search_aliases=["multi gpu", "vae decode", "distributed vae", "tiled"],
            inputs=[
                io.Latent.Input("samples", tooltip="The latent to decode."),
                io.Vae.Input("vae", tooltip="The VAE that decodes it."),
                rank_inputs.num_devices(
                    "How many devices decode together. More: faster and less memory on each. 0, and everything below "
                    "as it is: the processes that are there, else all of this machine. 1: decodes as VAE Decode does."
                ),
                rank_inputs.devices(),
                rank_inputs.backend(),
                rank_inputs.attach_to(),
            ],
            outputs=[io.Image.Output(tooltip="The decoded image, or the frames of the video.")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, samples, vae, num_devices, devices, backend, attach_to) -> io.NodeOutput:
        address, latent = attach_to.strip(), samples["samples"]
        if getattr(latent, "is_nested", False):
            latent = latent.unbind()[0]
        by_default = not (num_devices or devices.strip() or address) and backend == "auto"
        config = GROUPS.running() if by_default else None
        if config is None:
            chosen = rank_inputs.requested_devices(num_devices, devices, address)
            config = ParallelConfig(chosen, backend=backend, attach_to=address)
        listener = partial(send_notice, cls.hidden.unique_id)
        if len(config.devices) == 1:
            check_alone(config, devices, vae.device)
            images = vae.decode(latent)
            listener(ParallelNotice("decoded_alone"))
        else:
            images = parallel_vae_decode(vae, latent, config, GROUPS.session, listener=listener)
        return io.NodeOutput(images.flatten(0, -4) if images.ndim == 5 else images)
