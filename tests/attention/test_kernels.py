"""Local attention with its log-sum-exp, and the exact merge of key blocks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from para_core.attention import kernels
from para_core.attention.kernels import attention_with_lse, reference, require_lse, update_out_and_lse
from para_core.attention.masks import additive

ROUNDING = 4e-6  # of float32 on scores of +-20


def tensors(queries: int = 9, keys: int = 11, *, heads: int = 4, key_heads: int = 4, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = (heads, queries), (key_heads, keys), (key_heads, keys)
    q, k, v = (torch.randn(2, count, tokens, 16).to(dtype) for count, tokens in shapes)
    return q * 4, k, v


def plain_lse(q, k, mask=None, scale=0.25):
    scores = q.double() @ k.double().transpose(-1, -2) * scale
    return torch.logsumexp(scores if mask is None else scores + additive(mask, torch.float64), -1)


@pytest.fixture(params=["cpu_flash", "reference"])
def kernel(request, monkeypatch):
    """Each of the kernels that a CPU can run, as the chosen one."""
    monkeypatch.setattr(kernels, "_kernel", lambda *_: getattr(kernels, request.param))


@pytest.mark.parametrize("scale", [None, 0.1])
def test_lse_is_the_natural_log_of_the_sum(kernel, scale):
    q, k, v = tensors()
    out, lse = attention_with_lse(q, k, v, scale=scale)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, scale=scale), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(lse.double(), plain_lse(q, k, scale=scale or 0.25), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("shape", [(9, 11), (1, 1, 1, 11), (2, 1, 1, 11), (2, 4, 9, 11), (1, 4, 1, 11)])
@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_masks_of_every_shape(kernel, shape, kind):
    q, k, v = tensors()
    mask = torch.rand(shape) < 0.6
    mask[..., 0] = True
    mask = mask if kind == "bool" else torch.randn(shape).masked_fill(~mask, -torch.inf)
    out, lse = attention_with_lse(q, k, v, mask=mask)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, attn_mask=mask), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(lse.double(), plain_lse(q, k, mask), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_query_without_keys_gets_nothing(kernel, dtype):
    q, k, v = tensors(dtype=dtype)
    mask = torch.ones(9, 11, dtype=torch.bool)
    mask[3] = False
    for given in (mask, torch.zeros(9, 11).masked_fill(~mask, -torch.inf)):
        out, lse = attention_with_lse(q, k, v, mask=given)
        assert (out[:, :, 3] == 0).all() and (lse[:, :, 3] == -torch.inf).all()
        assert out.isfinite().all() and lse[:, :, [2, 4]].isfinite().all() and lse.dtype == torch.float32


def test_minimum_of_float32_is_no_number_in_bfloat16(kernel):
    q, k, v = tensors(dtype=torch.bfloat16)
    mask = torch.full((1, 1, 1, 11), torch.finfo(torch.float32).min)
    out, lse = attention_with_lse(q, k, v, mask=mask)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(("queries", "keys"), [(0, 5), (5, 0), (0, 0)])
def test_nothing_to_attend_to_does_not_crash(queries, keys):
    q, k, v = tensors(queries, keys)
    out, lse = attention_with_lse(q, k, v, mask=torch.ones(1, 1, 1, keys, dtype=torch.bool))
    assert out.shape == (2, 4, queries, 16) and lse.shape == (2, 4, queries)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_grouped_query_heads(kernel):
    q, k, v = tensors(heads=6, key_heads=2)
    out, lse = attention_with_lse(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, enable_gqa=True), atol=ROUNDING, rtol=0)
    torch.testing.assert_close(lse.double(), plain_lse(q, k.repeat_interleave(3, 1)), atol=ROUNDING, rtol=0)


def test_values_of_another_width():
    q, k, v = tensors()
    out, _ = attention_with_lse(q, k, v[..., :8])
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v[..., :8]), atol=ROUNDING, rtol=0)


def test_cpu_uses_flash_where_it_can():
    q, k, v = tensors()
    assert kernels._kernel(q, k, v, None, "pytorch") is kernels.cpu_flash
    assert kernels._kernel(q, k, v[..., :8], None, "pytorch") is kernels.reference
    out, _ = attention_with_lse(q.transpose(-1, -2).contiguous().transpose(-1, -2), k, v)
    assert torch.equal(out, attention_with_lse(q, k, v)[0])


def test_reference_in_portions_of_rows(monkeypatch):
    q, k, v = tensors()
    mask = additive(torch.rand(9, 11) < 0.7, torch.float32)
    whole = reference(q, k, v, mask[None, None], None)
    monkeypatch.setattr(kernels, "REFERENCE_SCORES", 2 * 4 * 11 * 2)
    for portion, expected in zip(reference(q, k, v, mask[None, None], None), whole, strict=True):
        torch.testing.assert_close(portion, expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("backend", ["sage", "sage3", "sub_quad", "split", "comfy_kitchen_int8"])
def test_backend_without_lse_is_refused_by_name(backend):
    with pytest.raises(ValueError, match=f'^attention "{backend}" returns no log-sum-exp.*allowed are pytorch, flash'):
        require_lse(backend)


def test_merge_is_exact_in_any_order():
    q, k, v = (x.double() for x in tensors(keys=12))
    blocks = [attention_with_lse(q, k[:, :, part], v[:, :, part]) for part in (slice(5), slice(5, 6), slice(6, 12))]
    for order in ((0, 1, 2), (2, 0, 1)):
        out, lse = (x.clone() for x in blocks[order[0]])
        for index in order[1:]:
            out, lse = update_out_and_lse(out, lse, *blocks[index])
        torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-14, rtol=0)
        torch.testing.assert_close(lse, plain_lse(q, k), atol=1e-14, rtol=0)


def test_merge_with_blocks_that_saw_nothing():
    out, lse = torch.ones(1, 1, 3, 2), torch.tensor([[[0.0, -torch.inf, -torch.inf]]])
    out[0, 0, 1:] = 0
    block_out, block_lse = torch.full((1, 1, 3, 2), 5.0), torch.tensor([[[-torch.inf, 2.0, -torch.inf]]])
    block_out[0, 0, [0, 2]] = 0
    merged, merged_lse = update_out_and_lse(out, lse, block_out, block_lse)
    assert merged[0, 0].tolist() == [[1, 1], [5, 5], [0, 0]]
    assert merged_lse[0, 0].tolist() == [0, 2, -torch.inf]


def test_merge_does_not_overflow():
    out, lse = update_out_and_lse(
        torch.ones(1, 1, 1, 1), torch.full((1, 1, 1), 3e4), torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1), -3e4)
    )
    assert out.item() == 1 and lse.item() == 3e4


@pytest.mark.gpu
@pytest.mark.parametrize("name", kernels.CUDA_KERNELS)
@pytest.mark.parametrize("shape", [None, (1, 1, 1, 37), (2, 4, 35, 37)], ids=["no mask", "keys", "whole"])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_kernels_of_a_gpu_give_the_reference_s_result_and_lse(name, shape, key_heads):
    """Odd counts: some pad the log-sum-exp, some demand aligned masks."""
    q, k, v = (x.to("cuda", torch.bfloat16) for x in tensors(35, 37, key_heads=key_heads))
    bias = None if shape is None else torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    found, runs = kernels.CUDA_KERNELS[name]
    params = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, key_heads != 4)
    if not runs(params):
        pytest.skip(f"{name} does not take these on {torch.cuda.get_device_name()}")
    out, lse = found(q, k, v, bias, None)
    expected = reference(q.float(), k.float(), v.float(), None if bias is None else bias.float(), None)
    torch.testing.assert_close(out.float(), expected[0], atol=3e-2, rtol=0)
    torch.testing.assert_close(lse, expected[1], atol=3e-2, rtol=0)


NEWER, OLDER = ["cudnn", "flash", "efficient"], ["flash", "efficient", "cudnn"]


@pytest.mark.parametrize(
    ("capability", "hip", "fastest"),
    [((8, 9), None, OLDER), ((9, 0), None, NEWER), ((12, 0), None, NEWER), ((9, 4), "6.2", OLDER)],
)
@pytest.mark.parametrize(("backend", "chosen"), [("pytorch", []), ("flash", ["flash"]), ("xformers", ["efficient"])])
def test_gpu_tries_the_users_kernel_first_and_then_its_fastest(monkeypatch, capability, hip, fastest, backend, chosen):
    """Among kernels that can all run, each of which fails in its turn."""
    able = dict.fromkeys(NEWER, True)
    table = {name: (name, lambda params, name=name: able[name]) for name in NEWER}
    monkeypatch.setattr(kernels, "CUDA_KERNELS", table)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.backends.cuda, "SDPAParams", lambda *given: None)
    on_gpu = SimpleNamespace(device=torch.device("cuda:0"), shape=torch.Size((1, 2, 3, 4)))
    order = []
    while (found := kernels._kernel(on_gpu, on_gpu, on_gpu, None, backend)) is not reference:
        order.append(found)
        able[found] = False
    assert order == list(dict.fromkeys([*chosen, *fastest]))
