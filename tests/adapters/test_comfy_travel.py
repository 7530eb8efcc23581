"""What goes to the ranks with a model call arrives as it was, or is refused by its name."""

import collections

import pytest
import torch
from tiny_models import TINY_MODELS, build, host_version, sample

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = TINY_MODELS["flux"]


@pytest.mark.parametrize(
    "value",
    [torch.Size((2, 3)), (1, (2.0, None)), [True, {"a": "b"}], {1, 2}, frozenset("ab"), {"x": [b"z"]}, torch.half],
    ids=str,
)  # fmt: skip
def test_plain_values_arrive_as_they_were(comfy, value):
    from para_core.adapters.comfy_travel import received, sendable

    assert received(sendable(value, "it")) == value


@pytest.mark.parametrize("value", [collections.namedtuple("Pair", "a b")(1, 2), object(), {1: 2}, [object()]], ids=str)
def test_other_values_are_named(comfy, value):
    from para_core.adapters.comfy_travel import sendable

    with pytest.raises(ValueError, match="transformer option it is a .*, which cannot go to"):
        sendable(value, "transformer option it")


def test_the_hosts_lazy_cache_works_around_the_ranks(elsewhere):
    """Which are asked as often as the model itself would be."""
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 has the node in another form")
    from comfy_extras.nodes_easycache import LazyCacheNode

    def lazy(model):
        return LazyCacheNode.execute(model, 1e9, 0.2, 0.8, False).args[0]

    model = build(FLUX)
    expected = sample(lazy(model), FLUX, steps=8)
    assert torch.equal(sample(lazy(elsewhere(model)), FLUX, steps=8), expected)
    assert elsewhere.group.calls.count("forward") < 8
