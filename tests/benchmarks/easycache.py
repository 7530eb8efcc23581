"""ComfyUI's EasyCache in the real ComfyUI, used as a library on the same weights, prompts, noise and samplers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from torch import Tensor

from para_core.demo.host import find_comfyui
from para_core.demo.sampling import pack, unpack

from .methods import PLAIN, Method
from .samplers import Schedule
from .subject import GUIDANCE, Case, Subject

NODE_DEFAULTS = {"start_percent": 0.15, "end_percent": 0.95, "verbose": False}


class EasyCache(Method):
    """Its setting is the node's reuse_threshold; None is no cache."""

    def __init__(self) -> None:
        super().__init__("ComfyUI EasyCache", PLAIN)


class Host:
    """ComfyUI's own FLUX model with the subject's weights in float32."""

    def __init__(self, comfyui: Path, subject: Subject) -> None:
        sys.path.insert(0, str(comfyui))
        from comfy.cli_args import args

        # Before model_management is imported: without it that import looks for a GPU and fails.
        args.cpu = args.use_pytorch_cross_attention = True
        import comfy.sd
        from comfy.patcher_extension import WrappersMP

        logging.getLogger().setLevel(logging.WARNING)
        self.guidance = {"guidance": GUIDANCE} if subject.transformer.config.guidance_embeds else {}
        with torch.inference_mode():
            self.model = comfy.sd.load_diffusion_model(str(subject.file), model_options={"dtype": torch.float32})
        # EasyCache of 0.33 adds to its input in place. Where the model's dtype is the latent's, as in float32, that is
        # the latent itself: without a copy of it the node would do far worse here than on the usual 16 bit models.
        self.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "para_benchmark", on_a_copy)
        blocks = self.model.model.diffusion_model
        self.num_blocks = len(blocks.double_blocks) + len(blocks.single_blocks)
        self.count = 0
        for inner in (*(b.img_attn.qkv for b in blocks.double_blocks), *(b.linear1 for b in blocks.single_blocks)):
            inner.register_forward_pre_hook(self._add)

    def _add(self, *_) -> None:
        self.count += 1

    @torch.inference_mode()
    def run(self, reuse_threshold: float | None, case: Case, schedule: Schedule) -> tuple[Tensor, float]:
        """The final tokens and the share of block calls saved."""
        import comfy.sample
        import comfy.samplers
        from comfy_extras.nodes_easycache import EasyCacheNode

        model, finals = self.model, []
        if reuse_threshold is not None:
            model = EasyCacheNode.execute(model, reuse_threshold, **NODE_DEFAULTS).result[0]

        def sampler(model, x, sigmas, extra_args, callback, disable, **_):
            def velocity(x: Tensor, sigma: Tensor) -> Tensor:
                return (x - model(x, sigma[None], **extra_args)) / sigma

            finals.append(schedule.sample(velocity, x))
            return finals[0]

        self.count = 0
        conditioning = [[case.context, {"pooled_output": case.pooled, **self.guidance}]]
        noise = unpack(case.tokens)
        comfy.sample.sample_custom(
            model, noise, 1.0, comfy.samplers.KSAMPLER(sampler), schedule.sigmas, conditioning, conditioning,
            torch.zeros_like(noise), disable_pbar=True, seed=0,
        )  # fmt: skip
        return pack(finals[0]).clone(), 1 - self.count / (schedule.num_calls * self.num_blocks)


def on_a_copy(executor, x: Tensor, *args, **kwargs) -> Tensor:
    return executor(x.clone(), *args, **kwargs)


def missing(subject: Subject) -> str | None:
    """Why there is no EasyCache here."""
    if find_comfyui() is None:
        return "no ComfyUI found; set COMFYUI_PATH to a checkout"
    if subject.transformer.config.attention_head_dim != 128:
        return "ComfyUI takes FLUX weights with heads of 128 only"
    return None
