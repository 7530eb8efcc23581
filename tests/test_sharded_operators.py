"""What ranks do together inside compiled blocks: in the program's order on every rank. No ranks needed."""

import pytest
import torch
from torch import nn

from para_core.quantization_scheme import SCHEMES
from para_core.sharded_operators import attention, largest_magnitude, operators_of
from para_core.shared_scales import shared_scales


class Call:
    """Stands for a `ShardedCall`: notes what is asked of it, and answers for another rank whose largest is `other`."""

    def __init__(self, other=0.0):
        self.asked, self.other = [], torch.tensor(other)

    def next_attention(self):
        return ("img",)

    def attention(self, over, q, k, v, **options):
        self.asked.append(f"attention of {q.shape[2]}")
        return v.clone()

    def max(self, values):
        self.asked.append(f"max of {values.item():g}")
        return torch.maximum(values, self.other)


def two_streams(a, b):
    """Inductor would rather be done with one stream before it begins the other."""
    x, y = attention(a, a, a), attention(b, b, b)
    of_b, of_a = largest_magnitude(b), largest_magnitude(a)
    return (y * of_b).sum(-1), (x * of_a).sum(-1)


@pytest.mark.parametrize("lengths", [(300, 7), (7, 300)], ids=str)
def test_compiled_code_asks_in_the_order_of_the_program(lengths):
    """Attentions are told apart by their order, and ranks would wait for each other in different exchanges."""
    a, b = (value * torch.ones(1, 2, length, 8) for value, length in zip((-2, 1), lengths, strict=True))
    expected = [f"attention of {length}" for length in lengths] + ["max of 1", "max of 2"]
    for function in (two_streams, torch.compile(two_streams, fullgraph=True, dynamic=False)):
        call = Call()
        # Not from a cache, which knows code by what it calls and not by what that declares.
        with torch.compiler.config.patch(force_disable_caches=True), torch.inference_mode(), operators_of(call):
            y, x = function(a, b)
        assert call.asked == expected
        assert y.unique().tolist() == [8.0] and x.unique().tolist() == [-32.0]


def test_largest_magnitude_is_that_of_all_ranks():
    for x, expected in ((torch.tensor([[1.0, -4.0]]), 4.0), (torch.ones(2, 2), 3.0), (torch.ones(2, 0, 2), 3.0)):
        call = Call(other=3.0)
        with operators_of(call):
            found = largest_magnitude(x.bfloat16())
        assert (found.dtype, found.shape, found.item()) == (torch.float32, (), expected)
        assert len(call.asked) == 1, "the other ranks would wait"


def test_layers_with_one_scale_ask_and_are_put_back():
    class Layer(nn.Module):
        largest = None

        def __init__(self, scheme):
            super().__init__()
            self.scheme = SCHEMES[scheme]

    model = nn.ModuleDict({name: Layer(name) for name in SCHEMES})
    with pytest.raises(RuntimeError, match="in the middle"), shared_scales(model):
        assert [name for name, layer in model.items() if layer.largest] == ["fp8_dynamic_per_tensor"]
        raise RuntimeError("in the middle")
    assert not any("largest" in layer.__dict__ for layer in model.values())
