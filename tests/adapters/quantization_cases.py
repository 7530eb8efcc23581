"""What the tests of quantized models in ComfyUI share: quantizing, calling and patching a tiny model."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FLUX, build, with_sampler

# Importing bitsandbytes takes seconds; nf4 has its own tests.
SCHEMES = (
    "fp8_dynamic_per_tensor", "fp8_dynamic_per_row", "fp8_weight_only", "int8_dynamic_per_row", "int8_weight_only",
)  # fmt: skip
EACH_SCHEME = pytest.mark.parametrize("scheme", SCHEMES)
CPU = torch.device("cpu")


def quantize(patcher, scheme="fp8_dynamic_per_row", **patterns):
    return report_of(patcher, scheme, **patterns)[0]


def report_of(patcher, scheme="fp8_dynamic_per_row", include="", exclude=""):
    from para_core.adapters.comfy_quantization import apply_quantization
    from para_core.quantization_plan import Selection

    return apply_quantization(patcher, scheme, Selection.of(include, exclude))


def call(patcher, tiny=FLUX, *, unload=0):
    """What the model gives for one step. unload: bytes to move away when it is loaded."""
    outputs = []

    def once(model, x, sigmas):
        if unload:
            patcher.partially_unload(CPU, unload)
            assert patcher.model.model_lowvram
        outputs.append(model(x, sigmas[1]).clone())

    with_sampler(patcher, tiny, once)
    return outputs[0]


def add_lora(patcher, strength=1.0, size=0.03, tiny=FLUX):
    """A rank-4 LoRA on every linear of the blocks, as the LoRA nodes leave it on a clone."""
    import comfy.weight_adapter

    clone = patcher.clone()
    generator = torch.Generator().manual_seed(3)
    patches = {}
    for name, weight in build(tiny).model.state_dict().items():
        if "block" in name and weight.ndim == 2:
            up = torch.randn(weight.shape[0], 4, generator=generator) * size
            down = torch.randn(4, weight.shape[1], generator=generator) * size
            patches[name] = comfy.weight_adapter.LoRAAdapter(set(), (up, down, 4.0, None, None, None))
    assert len(clone.add_patches(patches, strength)) == len(patches)
    return clone


def relative(output, reference):
    return float((output.float() - reference.float()).norm() / reference.float().norm())
