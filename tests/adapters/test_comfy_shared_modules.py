"""Weights that the server sends to ranks are in memory once, where the server put them."""

import sys

import pytest
import torch
from tiny_models import FLUX, build, size_of
from tiny_models.lora import NAMES, lora

pytestmark = [
    pytest.mark.usefixtures("comfy"),
    pytest.mark.skipif(sys.platform != "linux", reason="reads of its memory in /proc"),
]


def test_weights_of_a_module_are_where_the_server_put_them():
    from para_core.adapters.comfy_rank_models import from_module
    from para_core.adapters.comfy_travel import pack

    here = build(FLUX)
    packed, tensors = pack(here.model.diffusion_model)
    there = from_module(packed, tensors, torch.device("cpu")).clone()
    originals = {parameter.data_ptr() for parameter in here.model.parameters()}
    there.load(torch.device("meta"), lowvram_model_memory=1e32)
    there.partially_unload(torch.device("cpu"), size_of(there) // 2)
    moved = {parameter.data_ptr() for parameter in there.model.parameters() if not parameter.is_meta}
    assert moved and moved < originals
    there.unpatch_model(torch.device("cpu"))
    assert {parameter.data_ptr() for parameter in there.model.parameters()} == originals


def quantized_on_a_rank(here):
    """int8 weights as a rank gets them; the tensors with which they came."""
    from para_core.adapters.comfy_quantization import apply_quantization, quantized_weights
    from para_core.adapters.comfy_rank_models import from_module, quantized_to, with_quantized
    from para_core.adapters.comfy_travel import pack

    layers, tensors = quantized_to(quantized_weights(apply_quantization(here, "int8_weight_only")[0]))
    base = from_module(*pack(here.model.diffusion_model), torch.device("cpu"))
    return with_quantized(base, layers, tensors), tensors


@pytest.mark.parametrize("strength", [None, 0.5], ids=["plain", "lora"])
def test_quantized_weights_are_where_the_server_put_them(strength):
    """Also once they have been on a device, which in this test keeps no values."""
    there, tensors = quantized_on_a_rank(build(FLUX))
    model = there.clone() if strength is None else lora(there, strength)
    model.patch_model(load_weights=False)
    model.load(torch.device("meta"), lowvram_model_memory=1e32)
    layers = list(there.object_patches.values())
    assert layers and all(parameter.is_meta for layer in layers for parameter in layer.parameters())
    model.unpatch_model(torch.device("cpu"))
    assert [layer.weight.data_ptr() for layer in layers] == [tensor.data_ptr() for tensor in tensors[::2]]
    for layer, data, scale in zip(layers, tensors[::2], tensors[1::2], strict=True):
        weight = layer.quantized_weight()
        assert torch.equal(weight.data, data) and torch.equal(weight.scale, scale)


def test_what_a_rank_holds_for_itself_is_known():
    """Weights that are neither of a file nor of the server, and copies with a LoRA in them."""
    from para_core.adapters.comfy_shared_weights import private_bytes

    there, _ = quantized_on_a_rank(build(FLUX))
    assert private_bytes(there) == 0
    merged = [there.object_patches[f"diffusion_model.{name}"].weight.nbytes for name in NAMES]
    assert private_bytes(lora(there, 0.5)) == sum(merged) > 0
    assert private_bytes(build(FLUX)) == size_of(build(FLUX))
