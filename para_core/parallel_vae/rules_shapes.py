"""Operators that keep every row by itself: elementwise ones, views, joins, and reductions over other dims."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .rows import Rows
from .split_call import SplitCall

Rule = Callable[[SplitCall], object]


def pointwise(call: SplitCall) -> Tensor:
    """Elementwise with broadcasting: split operands agree, the others are the same for all rows."""
    split = [tensor for tensor in call.tensors() if call.rows(tensor)]
    rows, ndim = call.rows(split[0]), split[0].ndim
    right = rows.from_right(ndim)
    for tensor in call.tensors():
        other = call.rows(tensor)
        if other and other.from_right(tensor.ndim) != right:
            raise call.refusal(f"joins rows of {right[1:]} with rows of {other.from_right(tensor.ndim)[1:]}")
        if not other and not call.is_blank(tensor) and tensor.ndim >= right[0] and tensor.shape[-right[0]] != 1:
            raise call.refusal(f"joins the rows with a tensor of {tensor.shape[-right[0]]} rows that is not split")
    out = call.run()
    return call.note(out, rows.moved(out.ndim - right[0]))


def keep(call: SplitCall) -> Tensor:
    """The result has the input's shape and rows."""
    return call.note(call.run(), call.input_rows())


def view(call: SplitCall) -> Tensor:
    """Dims are merged or taken apart around the rows."""
    old, out = call.input, call.run()
    rows = call.input_rows().viewed(call.ranks.own_units, old.shape, out.shape)
    if rows is None:
        raise call.refusal(f"tears the rows apart, {tuple(old.shape)} to {tuple(out.shape)}")
    return call.note(out, rows)


def permute(call: SplitCall) -> Tensor:
    dims = [dim % call.input.ndim for dim in call["dims"]]
    rows = call.input_rows()
    return call.note(call.run(), rows.moved(dims.index(rows.dim)))


def transpose(call: SplitCall) -> Tensor:
    ndim, rows = call.input.ndim, call.input_rows()
    one, other = (0, 1) if call.name == "aten::t" else (call["dim0"] % ndim, call["dim1"] % ndim)
    return call.note(call.run(), rows.moved({one: other, other: one}.get(rows.dim, rows.dim)))


def unsqueeze(call: SplitCall) -> Tensor:
    rows = call.input_rows()
    dim = call["dim"] % (call.input.ndim + 1)
    return call.note(call.run(), rows.moved(rows.dim + (dim <= rows.dim)))


def squeeze(call: SplitCall) -> Tensor:
    x, rows = call.input, call.input_rows()
    chosen = call.values.get("dim", range(x.ndim))
    dims = [dim % x.ndim for dim in (chosen if isinstance(chosen, (list, tuple, range)) else [chosen])]
    return call.note(call.run(), rows.moved(rows.dim - sum(dim < rows.dim and x.shape[dim] == 1 for dim in dims)))


def expand(call: SplitCall) -> Tensor:
    rows = call.input_rows()
    return call.note(call.run(), rows.moved(len(call["size"]) - call.input.ndim + rows.dim))


def repeat(call: SplitCall) -> Tensor:
    rows, repeats = call.input_rows(), call["repeats"]
    dim = len(repeats) - call.input.ndim + rows.dim
    if repeats[dim] != 1:
        raise call.refusal("repeats the whole image along the split dim")
    return call.note(call.run(), rows.moved(dim))


def repeat_interleave(call: SplitCall) -> Tensor:
    rows, dim = call.input_rows(), call["dim"]
    if dim is None or not isinstance(call["repeats"], int):
        raise call.refusal("flattens the rows, or repeats them unequally")
    if dim % call.input.ndim != rows.dim:
        return call.note(call.run(), rows)
    if rows.extended:
        raise call.refusal("repeats padded rows")
    return call.note(call.run(), rows.scaled(call["repeats"]))


def select(call: SplitCall) -> Tensor:
    rows, dim = call.input_rows(), call["dim"] % call.input.ndim
    if dim == rows.dim:
        raise call.refusal("takes one row")
    return call.note(call.run(), rows.moved(rows.dim - (dim < rows.dim)))


def slice_(call: SplitCall) -> Tensor:
    """Along the rows only what lies beyond the rank's own may be cut off."""
    x, rows = call.input, call.input_rows()
    if call["dim"] % x.ndim != rows.dim:
        return call.note(call.run(), rows)
    start, stop, step = slice(call["start"], call["end"], call["step"]).indices(x.shape[rows.dim])
    before, after = rows.before - start, rows.after - (x.shape[rows.dim] - stop)
    if step != 1 or before < 0 or after < 0:
        raise call.refusal(f"takes rows {start} to {stop} of {x.shape[rows.dim]}")
    return call.note(call.run(), Rows(rows.dim, rows.outer, rows.inner, before, after))


def parts(call: SplitCall) -> list[Tensor]:
    """Split and chunk, along another dim."""
    rows = call.input_rows()
    if call["dim"] % call.input.ndim == rows.dim:
        raise call.refusal("divides the rows")
    return [call.note(part, rows) for part in call.run()]


def unbind(call: SplitCall) -> list[Tensor]:
    rows, dim = call.input_rows(), call["dim"] % call.input.ndim
    if dim == rows.dim:
        raise call.refusal("divides the rows")
    return [call.note(part, rows.moved(rows.dim - (dim < rows.dim))) for part in call.run()]


def join(call: SplitCall) -> Tensor:
    """Cat and stack, along another dim, of tensors that are all split alike or hold one value."""
    tensors = call["tensors"]
    known = {call.rows(tensor) for tensor in tensors if not call.is_blank(tensor)}
    if len(known) != 1 or None in known:
        raise call.refusal("joins tensors that are not all split alike")
    (rows,) = known
    stacks = call.name == "aten::stack"
    dim = call["dim"] % (tensors[0].ndim + stacks)
    if dim == rows.dim and not stacks:
        raise call.refusal("joins along the rows")
    return call.note(call.run(), rows.moved(rows.dim + (stacks and dim <= rows.dim)))


def reduce(call: SplitCall) -> Tensor:
    """Over other dims than the rows'."""
    x, rows, given = call.input, call.input_rows(), call.values.get("dim")
    dims = given if isinstance(given, (list, tuple)) else [given]
    dims = [dim % x.ndim for dim in dims if dim is not None] or range(x.ndim)
    if rows.dim in dims:
        raise call.refusal("sums up all rows")
    gone = 0 if call.values.get("keepdim") else sum(dim < rows.dim for dim in dims)
    return call.note(call.run(), rows.moved(rows.dim - gone))


def softmax(call: SplitCall) -> Tensor:
    if call["dim"] % call.input.ndim == call.input_rows().dim:
        raise call.refusal("normalises over all rows")
    return keep(call)


def elsewhere(call: SplitCall) -> Tensor:
    """The order of another dim changes."""
    dims = [dim % call.input.ndim for dim in call["dims"]]
    if not dims or call.input_rows().dim in dims:
        raise call.refusal("changes the order of the rows")
    return keep(call)


def trailing_norm(call: SplitCall) -> object:
    """Layer and RMS norm over the last dims, which must not be the rows'."""
    rows = call.input_rows()
    if rows.dim >= call.input.ndim - len(call["normalized_shape"]):
        raise call.refusal("normalises over all rows")
    out = call.run()
    first = out[0] if isinstance(out, tuple) else out
    call.note(first, rows)
    return out


def pixel_shuffle(call: SplitCall) -> Tensor:
    rows, factor = call.input_rows(), call["upscale_factor"]
    if rows.dim < call.input.ndim - 2 or rows.extended or rows.outer != 1:
        raise call.refusal("shuffles channels into rows that are merged with others")
    return call.note(call.run(), rows.scaled(factor))


def pixel_unshuffle(call: SplitCall) -> Tensor:
    rows, factor = call.input_rows(), call["downscale_factor"]
    if rows.dim < call.input.ndim - 2 or rows.extended or rows.outer != 1 or rows.inner % factor:
        raise call.refusal(f"takes {factor} rows as one")
    return call.note(call.run(), Rows(rows.dim, inner=rows.inner // factor))


def rules_of(*entries: tuple[Rule, str]) -> dict[str, Rule]:
    """Return the table from operator to rule; an entry's names are separated by blanks."""
    return {f"aten::{name}": rule for rule, names in entries for name in names.split()}


SAME = "clone detach alias _to_copy lift_fresh zeros_like ones_like empty_like full_like contiguous zero_ fill_ fill"
RULES = rules_of(
    (keep, SAME),
    (pointwise, "copy_"),
    (view, "view _unsafe_view _reshape_alias _reshape_copy"),
    (permute, "permute"),
    (transpose, "transpose t"),
    (unsqueeze, "unsqueeze"),
    (squeeze, "squeeze"),
    (expand, "expand"),
    (repeat, "repeat"),
    (repeat_interleave, "repeat_interleave"),
    (select, "select"),
    (slice_, "slice"),
    (parts, "split split_with_sizes"),
    (unbind, "unbind"),
    (join, "cat stack"),
    (reduce, "mean sum amax amin linalg_vector_norm var"),
    (softmax, "_softmax _log_softmax"),
    (elsewhere, "roll flip"),
    (trailing_norm, "native_layer_norm _fused_rms_norm"),
    (pixel_shuffle, "pixel_shuffle"),
    (pixel_unshuffle, "pixel_unshuffle"),
)
