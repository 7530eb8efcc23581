"""Token streams in what a block is given and what it returns: read and replaced where a family's data says they are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .families import Stream

Arguments = Mapping[str | int, Tensor | tuple[Tensor, ...]]
Result = Mapping[str, Tensor | tuple[Tensor, ...]] | tuple[Tensor, ...] | Tensor


def argument_of(arguments: Arguments, stream: Stream) -> Tensor:
    """The stream's tensor among a block's arguments."""
    value = arguments[stream.argument]
    return value if stream.part is None else value[stream.part]


def result_of(result: Result, stream: Stream) -> Tensor:
    """The stream's tensor in what a block returned."""
    value = result if stream.result is None else result[stream.result]
    return value if stream.part is None else value[stream.part]


def as_result(values: Mapping[Stream, Tensor]) -> Result:
    """A block's return value from its streams, in the form that their `result` and `part` say."""
    results: dict[str | int | None, Tensor | tuple[Tensor, ...]] = {}
    for stream, value in sorted(values.items(), key=lambda item: item[0].part or 0):
        results[stream.result] = value if stream.part is None else (*results.get(stream.result, ()), value)
    if None in results:
        return results[None]
    return results if isinstance(next(iter(results)), str) else tuple(results[index] for index in sorted(results))


def tokens_of(tensor: Tensor, stream: Stream, name: str, num_tokens: int) -> Tensor:
    """A view of the tokens called `name`, which stand first or last in the stream's tensor."""
    if stream.holds == (name,):
        return tensor
    start = 0 if stream.holds[0] == name else tensor.shape[stream.token_dim] - num_tokens
    return tensor.narrow(stream.token_dim, start, num_tokens)


def with_tokens(tensor: Tensor, stream: Stream, name: str, tokens: Tensor) -> Tensor:
    """The stream's tensor with its tokens called `name` exchanged for `tokens`; just these where it holds no others."""
    num_tokens = tokens.shape[stream.token_dim]
    num_others = 0 if stream.holds == (name,) else tensor.shape[stream.token_dim] - num_tokens
    if num_others == 0:
        return tokens
    if stream.holds[0] == name:
        return torch.cat((tokens, tensor.narrow(stream.token_dim, num_tokens, num_others)), stream.token_dim)
    return torch.cat((tensor.narrow(stream.token_dim, 0, num_others), tokens), stream.token_dim)


def with_result(result: Result, stream: Stream, name: str, tokens: Tensor) -> Result:
    """What a block returned, with the stream's tokens called `name` exchanged for `tokens`; the rest is shared."""
    return with_stream(result, stream, with_tokens(result_of(result, stream), stream, name, tokens))


def with_stream(result: Result, stream: Stream, value: Tensor) -> Result:
    """What a block returned, with the stream's tensor exchanged for `value`; the rest is shared."""
    return _exchanged(result, stream.result, stream.part, value)


def with_argument(arguments: Arguments, stream: Stream, value: Tensor) -> Arguments:
    """What a block is given, with the stream's tensor exchanged for `value`; the rest is shared."""
    return _exchanged(arguments, stream.argument, stream.part, value)


def _exchanged(whole: Result, key: str | int | None, part: int | None, value: Tensor) -> Result:
    if part is not None:
        parts = whole if key is None else whole[key]
        value = (*parts[:part], value, *parts[part + 1 :])
    if key is None:
        return value
    if isinstance(whole, Mapping):
        return {**whole, key: value}
    return (*whole[:key], value, *whole[key + 1 :])
