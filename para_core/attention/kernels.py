"""Attention of one rank over one block of keys with its log-sum-exp: the kernels, and which of them a device has.

The aten operators are those behind torch.nn.functional.scaled_dot_product_attention, which drops the log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import additive, blind_rows

# (q, k, v, additive mask or None, scale or None) -> (out, lse)
Kernel = Callable[[Tensor, Tensor, Tensor, "Tensor | None", "float | None"], tuple[Tensor, Tensor]]

# Attention that the user may have chosen in ComfyUI, to the kernels tried before all others. ComfyUI's "flash" and
# "xformers" are packages around the algorithms that torch carries itself, as FlashAttention-2 and as "efficient".
BACKENDS: dict[str, tuple[str, ...]] = {"pytorch": (), "flash": ("flash",), "xformers": ("efficient",)}
REFERENCE_SCORES = 2**25  # that the reference holds at once: 128 MB in float32


def require_lse(backend: str) -> None:
    """Refuse an attention backend, by its name in ComfyUI, that does not give the log-sum-exp which a ring needs."""
    if backend not in BACKENDS:
        raise ValueError(
            f'attention "{backend}" returns no log-sum-exp, which ring attention merges by; allowed are '
            f"{', '.join(BACKENDS)}. Choose one of these, or a mesh without a ring, which runs with any function."
        )


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, scale: float | None = None, backend: str = "pytorch"
) -> tuple[Tensor, Tensor]:
    """Attention over a block of keys, and the log of the sum of the exponentials of its scores.

    q: (B, H, Q, D); k, v: (B, G, K, D) with G dividing H (GQA). mask: bool or additive, broadcastable to (B, H, Q, K).
    Returns out like q, and lse (B, H, Q), natural log, float32 (float64 for float64); a query that sees no key gets
    0 and -inf. Raises ValueError for a backend without a log-sum-exp.
    """
    require_lse(backend)
    if not q.numel() or not k.shape[2]:  # the CPU kernel divides by either (SIGFPE, torch 2.14)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
        return q.new_zeros(*q.shape[:3], v.shape[-1]), lse
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    bias = None if mask is None else additive(mask, q.dtype)
    out, lse = _kernel(q, k, v, bias, backend)(q, k, v, bias, scale)
    if bias is not None:  # there the CPU kernel gives lse 0, others NaN
        blind = blind_rows(bias)
        out, lse = out.masked_fill(blind[..., None], 0), lse.masked_fill(blind, -torch.inf)
    return out, lse


def update_out_and_lse(out: Tensor, lse: Tensor, block_out: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the attention over one more key block into the running result.

    out, block_out: (B, H, S, D); out is float32 and changed in place. lse, block_lse: (B, H, S), natural log, float32.
    Source: zhuzilin/ring-flash-attention@8996282 utils.py; the sigmoid form does not overflow.
    """
    # Where neither has seen a key the difference is NaN and both outputs are 0: any weight will do.
    weight = torch.sigmoid(block_lse - lse).nan_to_num_(nan=0.5)
    return out.lerp_(block_out.to(out.dtype), weight[..., None]), torch.logaddexp(lse, block_lse)


def _kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, backend: str) -> Kernel:
    """The first that can run; the device is the same for all tensors."""
    if q.device.type == "cpu":
        return cpu_flash if _cpu_flash_runs(q, k, v) else reference
    if q.device.type != "cuda":
        return reference
    params = torch.backends.cuda.SDPAParams(q, k, v, bias, 0.0, False, k.shape[1] != q.shape[1])
    for name in (*BACKENDS[backend], *_cuda_order(q.device)):
        kernel, runs = CUDA_KERNELS[name]
        if runs(params):
            return kernel
    return reference


def _cuda_order(device: torch.device) -> tuple[str, ...]:
    """torch's own: cuDNN is the fastest from Hopper on."""
    if torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0):
        return "cudnn", "flash", "efficient"
    return "flash", "efficient", "cudnn"


def _cpu_flash_runs(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return q.dtype == k.dtype == v.dtype and q.itemsize > 1 and q.shape[-1] == v.shape[-1]


def cpu_flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)


def cuda_flash(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    return out, lse


def cuda_efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    if bias is not None:
        bias = _aligned(bias).expand(*q.shape[:3], k.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, scale=scale)
    return out, lse[..., : q.shape[2]]  # padded to a multiple of 32 queries


def cuda_cudnn(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    if bias is not None:
        bias = bias.expand(*q.shape[:3], k.shape[2])
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True, scale=scale)
    return out, lse.reshape(q.shape[:3])  # some versions keep a last dim of 1


def _cuda_flash_runs(params: torch.backends.cuda.SDPAParams) -> bool:
    # The operator itself does not pad head dims, unlike the function above it.
    return params.query.shape[-1] % 8 == 0 and torch.backends.cuda.can_use_flash_attention(params)


def _cuda_efficient_runs(params: torch.backends.cuda.SDPAParams) -> bool:
    q, heads = params.query, params.query.shape[1]
    k, v = repeat_heads(params.key, heads), repeat_heads(params.value, heads)
    repeated = torch.backends.cuda.SDPAParams(q, k, v, params.attn_mask, 0.0, False, False)
    return torch.backends.cuda.can_use_efficient_attention(repeated)


def _cuda_cudnn_runs(params: torch.backends.cuda.SDPAParams) -> bool:
    return torch.backends.cuda.can_use_cudnn_attention(params)


CUDA_KERNELS: dict[str, tuple[Kernel, Callable[[torch.backends.cuda.SDPAParams], bool]]] = {
    "flash": (cuda_flash, _cuda_flash_runs),
    "efficient": (cuda_efficient, _cuda_efficient_runs),
    "cudnn": (cuda_cudnn, _cuda_cudnn_runs),
}


def reference(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float | None) -> tuple[Tensor, Tensor]:
    """Plain softmax in float32, a bounded number of query rows at a time."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q_scaled = q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    keys, values = (repeat_heads(x, q.shape[1]).to(dtype) for x in (k, v))
    num_rows = max(1, REFERENCE_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    results = []
    for start in range(0, q.shape[2], num_rows):
        scores = q_scaled[:, :, start : start + num_rows] @ keys.transpose(-1, -2)
        if bias is not None:
            scores += bias if bias.shape[-2] == 1 else bias[..., start : start + num_rows, :]
        lse = torch.logsumexp(scores, -1)
        results.append(((scores - lse[..., None]).exp_() @ values, lse))
    out, lse = zip(*results, strict=True)
    return torch.cat(out, 2).to(q.dtype), torch.cat(lse, 2)


def repeat_heads(x: Tensor, num_heads: int) -> Tensor:
    """Every head of (B, G, S, D) repeated in place to num_heads (GQA)."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)


def _aligned(bias: Tensor) -> Tensor:
    """The same values in rows that start at multiples of 16 bytes, which the efficient kernel demands."""
    num_keys = bias.shape[-1]
    return F.pad(bias, (0, -num_keys % 8))[..., :num_keys]
