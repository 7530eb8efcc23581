"""Products of matrices and attention over rows: what is summed over comes from all ranks."""

from __future__ import annotations

from torch import Tensor

from .rules_shapes import rules_of
from .split_call import SplitCall

# The places of a product's dims, counted from the right; from 3 on they are batch.
SUMMED_LEFT, FREE_LEFT, FREE_RIGHT, SUMMED_RIGHT = 1, 2, 1, 2
ADDENDS = {"aten::addmm": ("mat1", "mat2"), "aten::baddbmm": ("batch1", "batch2")}


def matmul(call: SplitCall) -> Tensor:
    """Matrices or batches of them. Rows that are summed over, and those of a second operand, are gathered first."""
    first, second = ADDENDS.get(call.name, (call.input_name, "other" if call.name == "aten::matmul" else "mat2"))
    left, right = call[first], call[second]
    pair = _place(call, left), _place(call, right)
    if call.name in ADDENDS and call.rows(call.input):
        raise call.refusal("adds split rows to a product")
    if pair in ((FREE_LEFT, SUMMED_RIGHT), (FREE_LEFT, FREE_RIGHT)):
        place, rows, right = FREE_LEFT, call.rows(left), call.gathered(right)
    elif pair == (SUMMED_LEFT, FREE_RIGHT):
        place, rows, left = FREE_RIGHT, call.rows(right), call.gathered(left)
    elif pair in ((FREE_LEFT, None), (None, FREE_RIGHT)) or _in_batch(left, right, *pair):
        place, rows = pair[0] or pair[1], call.rows(left) or call.rows(right)
    else:
        raise call.refusal("sums up all rows, or has them in the batch of one operand only")
    out = call.run(**{first: left, second: right})
    return call.note(out, rows.moved(out.ndim - place))


def _place(call: SplitCall, operand: Tensor) -> int | None:
    """Where an operand's rows are, counted from the right."""
    rows = call.rows(operand)
    return None if rows is None else operand.ndim - rows.dim


def _in_batch(left: Tensor, right: Tensor, at_left: int | None, at_right: int | None) -> bool:
    """Whether the rows are a dim of the batch, in both operands or broadcast over one."""
    if at_left and at_right:
        return at_left == at_right > 2
    place, other = (at_left, right) if at_left else (at_right, left)
    return place > 2 and (other.ndim < place or other.shape[-place] == 1)


def attention(call: SplitCall) -> object:
    """Queries stay, keys and values come from all ranks."""
    query, key, value = call["query"], call["key"], call["value"]
    rows = call.rows(query)
    if rows is None or {call.rows(tensor) and call.rows(tensor).dim for tensor in (key, value)} != {rows.dim}:
        raise call.refusal("has split rows in some of query, key and value only")
    mask = call.values.get("attn_mask", call.values.get("attn_bias"))
    if mask is not None or call.values.get("is_causal") or rows.dim == query.ndim - 1:
        raise call.refusal("over split rows has a mask, or the rows as features")
    if rows.dim == query.ndim - 2:
        key, value = call.gathered(key), call.gathered(value)
    out = call.run(key=key, value=value)
    call.note(out[0] if isinstance(out, tuple) else out, rows)
    return out


ATTENTIONS = "scaled_dot_product_attention _scaled_dot_product_flash_attention"
ATTENTIONS += " _scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_efficient_attention"
ATTENTIONS += " _scaled_dot_product_cudnn_attention"
RULES = rules_of((matmul, "mm bmm addmm baddbmm matmul"), (attention, ATTENTIONS))
