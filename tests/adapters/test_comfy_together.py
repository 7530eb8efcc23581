"""The nodes of this pack together on the tiny FLUX: every subset, in every order, gives one result.

Another node is one more line in NODES, which keeps its own rounding in mind.
"""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from tiny_models import FLUX, build, fbcache, sample

pytestmark = pytest.mark.usefixtures("comfy")


def cache(patcher):
    return fbcache(patcher, 100.0, max_consecutive_hits=2)


def quantize(patcher):
    from para_core.adapters.comfy_quantization import apply_quantization

    return apply_quantization(patcher, "int8_weight_only")[0]


def compile_model(patcher):
    """With the backend that generates no code: so equal means to the bit. Rounding is test_comfy_inductor.py's."""
    from para_core.adapters.comfy_compile import apply_compile
    from para_core.compile_config import CompileConfig

    return apply_compile(patcher, CompileConfig(backend="eager", dynamic="on"))


NODES = {"cache": cache, "quantize": quantize, "compile": compile_model}
SUBSETS = [names for count in range(1, len(NODES) + 1) for names in combinations(NODES, count)]


def wired(model, names):
    for name in names:
        model = NODES[name](model)
    return model


def reused(patcher):
    from para_core.adapters.comfy_fbcache import last_report

    report = last_report(patcher)
    return report and [record.reused for record in report.conditionings["positive"]]


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return build(FLUX)


@pytest.fixture(scope="module")
def expected(model):
    """By what changes numbers: the sampled latent, and which steps were reused."""
    found = {}
    with torch.inference_mode():
        for names in SUBSETS:
            key = tuple(name for name in names if name != "compile")
            if key not in found:
                patcher = wired(model, key)
                found[key] = sample(patcher, FLUX, cfg=4.0), reused(patcher)
    return found


@pytest.mark.parametrize("names", [order for names in SUBSETS for order in permutations(names)], ids="+".join)
def test_every_order_gives_the_same(model, expected, names):
    from para_core.adapters.comfy_compile import last_compile_report

    latent, steps = expected[tuple(name for name in NODES if name in names and name != "compile")]
    patcher = wired(model, names)
    assert torch.equal(sample(patcher, FLUX, cfg=4.0), latent)
    assert reused(patcher) == steps
    assert (steps is not None) == ("cache" in names) and (steps is None or sum(steps) == 4)
    if "compile" in names:
        report = last_compile_report(patcher)
        assert report.num_blocks == 5 and report.uncompiled == {}
        # Both kinds, plain and quantized: nothing more, whatever was wired before.
        assert report.num_compilations <= 4


def test_the_nodes_leave_the_model_as_it_was(model, expected):
    assert torch.equal(sample(model, FLUX, cfg=4.0), expected[()][0])
