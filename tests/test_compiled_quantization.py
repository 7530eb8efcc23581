"""Dynamic schemes in generated code: their own numbers are exact, so whole models differ only by codes that flip."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm

from para_core.quantization import choose_scale, kernel_linear, quantize, round_to
from para_core.quantization_scheme import SCHEMES

FEATURES = 256


@pytest.mark.parametrize("name", [name for name, scheme in SCHEMES.items() if scheme.dynamic])
def test_generated_code_gives_the_same_scales_codes_and_products(name):
    """Of the activation that it has itself; that one is off by float32's rounding, as fusing adds in another order.

    Where such an error meets a tie, the code is the neighbouring one. That is the scheme's own rounding, and all that
    a compiled model differs by.
    """
    scheme = SCHEMES[name]
    generator = torch.Generator().manual_seed(0)
    weight = quantize(torch.randn(96, FEATURES, generator=generator) * 0.05, scheme)
    bias = torch.randn(96, generator=generator)
    x = torch.randn(512, FEATURES, generator=generator) * 10 ** torch.randn(512, 1, generator=generator)

    def block(x):
        activation = layer_norm(x, (FEATURES,)) * (1 + x[:1]) + x[1:2]
        scale = choose_scale(activation, scheme)
        return activation, scale, round_to(activation, scale, scheme), weight.linear(activation, bias)

    activation, scale, codes, product = torch.compile(block, fullgraph=True)(x)
    assert torch.equal(scale, choose_scale(activation, scheme))
    assert torch.equal(codes.float(), round_to(activation, scale, scheme).float())
    assert (product - weight.linear(activation, bias)).norm() <= 1e-6 * product.norm()

    plain, _, plain_codes, plain_product = block(x)
    assert (activation - plain).norm() <= 1e-6 * plain.norm()
    steps = (ordered(codes) - ordered(plain_codes)).abs()
    assert steps.max() <= 1 and (steps > 0).float().mean() < 1e-3
    # A row without a flip is as exact as without quantization.
    same = steps.amax(-1) == 0
    assert same.float().mean() > 0.5
    assert (product - plain_product)[same].norm() <= 1e-5 * plain_product[same].norm()


def test_kernels_with_a_scale_from_outside_compile_in_one_piece():
    """As on a rank with a GPU; torchao's tensors can be traced here too."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    weight = quantize(torch.randn(96, FEATURES) * 0.05, SCHEMES["fp8_dynamic_per_tensor"])
    x, bias, largest = torch.randn(3, 7, FEATURES), torch.randn(96), torch.tensor(40.0)
    compiled = torch.compile(kernel_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, x, bias, largest), kernel_linear(weight, x, bias, largest))


def ordered(codes):
    """Each code's place among all codes of its dtype."""
    if codes.dtype == torch.int8:
        return codes.int()
    bits = codes.view(torch.uint8).int()
    return torch.where(bits >= 128, 128 - bits, bits)
