"""Operators that mix neighbouring rows, or all rows by their statistics: convolution, padding, upsampling, norms."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .rows import Rows
from .rules_shapes import keep, rules_of
from .split_call import SplitCall


def convolution(call: SplitCall) -> Tensor:
    """The neighbours' rows stand where a slice ends, the decoder's own zeros where the image ends."""
    x, rows, weight = call.input, call.input_rows(), call["weight"]
    spatial = rows.dim - 2
    if spatial < 0 or x.ndim != weight.ndim:
        raise call.refusal("takes the rows as batch or channels")
    if call.values.get("transposed"):
        return _transposed(call, rows, spatial)
    padding, stride = _spread(call["padding"], weight), _spread(call["stride"], weight)
    span = _spread(call["dilation"], weight)[spatial] * (weight.shape[rows.dim] - 1) + 1
    if padding[spatial]:
        x, rows = _padded(call, x, rows, (padding[spatial], padding[spatial]))
    step = stride[spatial]
    surplus = rows.before + rows.after - (span - step)
    if not 0 <= surplus < step or rows.inner % step or (rows.outer != 1 and span != 1):
        raise call.refusal(
            f"of {span} rows with stride {step} and padding {rows.before}, {rows.after} does not give whole slices"
        )
    x = x.narrow(rows.dim, 0, x.shape[rows.dim] - surplus)
    padding[spatial] = 0
    out = call.run(**{call.input_name: x, "padding": padding})
    return call.note(out, Rows(rows.dim, rows.outer, rows.inner // step))


def _transposed(call: SplitCall, rows: Rows, spatial: int) -> Tensor:
    weight = call["weight"]
    stride = _spread(call["stride"], weight)[spatial]
    clean = not _spread(call["padding"], weight)[spatial] and not _spread(call["output_padding"], weight)[spatial]
    if weight.shape[rows.dim] != stride or not clean or rows.extended or rows.outer != 1:
        raise call.refusal(f"is transposed and its {weight.shape[rows.dim]} rows overlap at stride {stride}")
    return call.note(call.run(), rows.scaled(stride))


def _spread(values: list[int], weight: Tensor) -> list[int]:
    """A single value counts for all spatial dims."""
    return list(values) * (weight.ndim - 2) if len(values) == 1 else list(values)


def _padded(
    call: SplitCall, x: Tensor, rows: Rows, amounts: tuple[int, int], mode: str = "constant", value: float = 0.0
) -> tuple[Tensor, Rows]:
    """Extend a slice before and after: by other ranks' rows, and by padding where the image ends."""
    if rows.extended or rows.outer != 1 or min(amounts) < 0:
        raise call.refusal(f"pads rows by {amounts} that are padded already or merged with others")
    x = call.ranks.extend(x, rows.dim, rows.inner, amounts)
    ends = call.ranks.beyond_image(rows.inner, amounts)
    if any(ends):
        flat = [0, 0] * (x.ndim - 1 - rows.dim) + ends
        x = F.pad(x, flat if mode == "constant" else flat + [0, 0] * (x.ndim - 2 - len(flat) // 2), mode, value)
    return x, Rows(rows.dim, 1, rows.inner, *amounts)


def pad(call: SplitCall) -> Tensor:
    """Padding by zeros, a value, the border or a mirror."""
    name, x, rows = call.name, call.input, call.input_rows()
    amounts = list(call["pad" if name == "aten::constant_pad_nd" else "padding"])
    at = 2 * (x.ndim - 1 - rows.dim)
    own = tuple(amounts[at : at + 2]) or (0, 0)
    if not any(own):
        return call.note(call.run(), rows)
    mode = {"constant": "constant", "replication": "replicate", "reflection": "reflect"}[name[6:].split("_")[0]]
    value = call["value"] if mode == "constant" else None
    x, rows = _padded(call, x, rows, own, mode, value)
    amounts[at : at + 2] = [0, 0]
    if any(amounts):
        x = F.pad(x, amounts, mode, value)
    return call.note(x, rows)


def upsample_nearest(call: SplitCall) -> Tensor:
    """By a whole factor that was given as a factor; a size would be the whole image's."""
    rows, x = call.input_rows(), call.input
    each = [value for name, value in call.values.items() if name.startswith("scales")]
    scales = call["scale_factors"] if "scale_factors" in call.values else each
    scale = scales[rows.dim - 2] if scales and rows.dim >= 2 else None
    if scale is None or scale != int(scale) or rows.extended or rows.outer != 1:
        raise call.refusal(f"from {x.shape[rows.dim]} rows by {scale}: only whole factors are exact on slices")
    return call.note(call.run(), rows.scaled(int(scale)))


def group_norm(call: SplitCall) -> tuple[Tensor, Tensor, Tensor]:
    """With the mean and variance over all ranks; they travel in float32."""
    x, rows, groups = call.input, call.input_rows(), call["group"]
    if rows.dim < 2 or rows.extended:
        raise call.refusal("takes the rows as channels, or normalises padded ones")
    mean, variance = _moments(call, x, groups)
    batch, channels = x.shape[:2]
    # As a batch norm whose channels are all channels of all pictures: one kernel, float32 inside.
    each = [value.repeat_interleave(channels // groups) for value in (mean, variance)]
    affine = [None if value is None else value.float().repeat(batch) for value in (call["weight"], call["bias"])]
    out = F.batch_norm(x.reshape(1, batch * channels, *x.shape[2:]), *each, *affine, eps=call["eps"])
    out = call.note(out.view(x.shape), rows)
    return out, mean.view(batch, groups), (variance + call["eps"]).rsqrt().view(batch, groups)


def _moments(call: SplitCall, x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance, (batch * groups,) float32, over the rows of all ranks."""
    parts = x.reshape(x.shape[0] * groups, -1)
    if x.dtype == torch.float32:
        local = _local_moments(parts)
    else:
        # one by one: in half precision a float32 copy of everything would be the decoder's largest tensor
        local = torch.cat([_local_moments(part[None].float()) for part in parts])
    variances, means = call.ranks.gather_one_each(local).unbind(-1)
    share = torch.tensor(call.ranks.units, device=x.device, dtype=torch.float32)[:, None] / sum(call.ranks.units)
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0)


def _local_moments(parts: Tensor) -> Tensor:
    """Return variance and mean of each row, (number of rows, 2)."""
    if parts.is_cpu:
        # var_mean takes seven times as long there (torch 2.14); without an epsilon 1 / sqrt(variance) comes back
        _, mean, scale = torch.native_group_norm(parts[:, None], None, None, len(parts), 1, parts.shape[1], 1, 0.0)
        return torch.cat([scale.square().reciprocal(), mean], 1)
    return torch.stack(torch.var_mean(parts, 1, correction=0), 1)


def batch_norm(call: SplitCall) -> object:
    """With running statistics; those of the batch would need all rows."""
    if call.values.get("training", call.name != "aten::_native_batch_norm_legit_no_training"):
        raise call.refusal("normalises over all rows")
    out = call.run()
    call.note(out[0], call.input_rows())
    return out


def random_like(call: SplitCall) -> Tensor:
    """Every rank draws for the whole image and takes its slice: as on one device, where all have one seed."""
    x, rows = call.input, call.input_rows()
    if rows.outer != 1 or rows.extended:
        raise call.refusal("draws for padded or merged rows")
    shape = list(x.shape)
    shape[rows.dim] = sum(call.ranks.units) * rows.inner
    whole = call.run(**{call.input_name: x.new_empty(shape)})
    own = whole.narrow(rows.dim, call.ranks.start * rows.inner, x.shape[rows.dim])
    return call.note(own.clone(), rows)


PADS = "constant_pad_nd replication_pad1d replication_pad2d replication_pad3d"
PADS += " reflection_pad1d reflection_pad2d reflection_pad3d"
UPSAMPLES = "upsample_nearest1d upsample_nearest2d upsample_nearest3d"
UPSAMPLES += " _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d"
RULES = rules_of(
    (convolution, "convolution cudnn_convolution"),
    (pad, PADS),
    (upsample_nearest, UPSAMPLES),
    (group_norm, "native_group_norm"),
    (batch_norm, "native_batch_norm cudnn_batch_norm _native_batch_norm_legit_no_training"),
    (random_like, "randn_like rand_like"),
    (keep, "hardswish hardswish_"),
)
