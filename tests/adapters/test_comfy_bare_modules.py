"""Modules on their way to other processes: without what the host's memory management keeps on them."""

import pytest
import torch
from tiny_models import FLUX, build, sample
from torch import nn

pytestmark = pytest.mark.usefixtures("comfy")


def travelled(module, *, dynamic):
    from para_core.adapters.comfy_travel import pack, unpack

    return unpack(*pack(module, dynamic=dynamic))


def test_a_model_of_which_the_host_casts_the_weights(elsewhere, dynamic_vram):
    """Without a recipe, before and after the host has used it; its weights are in another dtype than it computes in."""
    model = build(FLUX).model
    own = next(model.parameters()).dtype
    expected = sample(dynamic_vram(model, torch.device("cpu"), torch.device("cpu")), FLUX)
    narrow = {name: tensor.to(torch.bfloat16) for name, tensor in model.diffusion_model.state_dict().items()}
    model.diffusion_model.load_state_dict(narrow, assign=True)
    patcher = dynamic_vram(model, torch.device("cpu"), torch.device("cpu"))
    unused = sample(elsewhere(patcher), FLUX)
    here = sample(patcher, FLUX)
    elsewhere.group.recover.__self__.prepared._built.clear()
    used = sample(elsewhere(patcher), FLUX)
    assert torch.equal(used, here) and torch.equal(unused, here) and not torch.equal(here, expected)
    there = next(iter(elsewhere.group.service._models.values())).model.diffusion_model
    assert {parameter.dtype for parameter in there.parameters()} == {own}
    assert any(hasattr(module, "_v") for module in model.modules()), "the host has left nothing: this tests nothing"
    assert not any(hasattr(module, "_v") or hasattr(module, "_pin_state") for module in there.modules())


def linear(dtype):
    import comfy.ops

    layer = comfy.ops.disable_weight_init.Linear(3, 2)
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).to(torch.float16)
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), None
    layer.weight_comfy_model_dtype = dtype
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, None], ids=["known", "made without a dtype"])
def test_a_layer_computes_in_the_dtype_that_the_host_casts_it_to(dtype):
    layer, x = linear(dtype), torch.ones(1, 3)
    expected = nn.functional.linear(x, layer.weight.float())
    assert torch.equal(travelled(layer, dynamic=True)(x), expected)
    assert travelled(layer, dynamic=False).weight.dtype == layer.weight.dtype == torch.float16
    assert not vars(layer).get("comfy_cast_weights")


def test_a_weight_of_two_layers_travels_once_and_buffers_are_cast():
    from para_core.adapters.comfy_travel import pack, unpack

    first, second = linear(torch.float32), linear(torch.float32)
    second.weight = first.weight
    both = nn.ModuleList([first, second])
    both.register_buffer("mean", torch.ones(2, dtype=torch.float64))
    both.mean_comfy_model_dtype = torch.float32
    packed, tensors = pack(both, dynamic=True)
    assert sorted(tensor.dtype is torch.float32 for tensor in tensors) == [True, True]
    there = unpack(packed, tensors)
    assert there[0].weight.data_ptr() == there[1].weight.data_ptr() and there.mean.dtype is torch.float32
