"""The nodes of this pack together on the tiny FLUX: every subset, in every order, gives one result.

Another node is one more line in `nodes`, which keeps its own rounding in mind.
"""

from __future__ import annotations

from itertools import combinations, permutations

import pytest
import torch
from tiny_models import FLUX, build, fbcache, relative, sample

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


NODES = ("cache", "quantize", "compile", "launcher")
SUBSETS = [names for count in range(1, len(NODES) + 1) for names in combinations(NODES, count)]
ON_RANKS = 1e-6  # float32 rounding: other shapes of the same matrices


@pytest.fixture(scope="module")
def nodes(groups):
    def launcher(patcher):
        from para_core.adapters.comfy_parallel import apply_parallel
        from para_core.parallel_config import ParallelConfig

        return apply_parallel(patcher, ParallelConfig(("cpu", "cpu")), groups.session)

    return {"cache": cache, "quantize": quantize, "compile": compile_model, "launcher": launcher}


def reused(patcher):
    from para_core.adapters.comfy_fbcache import last_report

    report = last_report(patcher)
    return report and [record.reused for record in report.conditionings["positive"]]


@pytest.fixture(scope="module")
def model():
    with torch.inference_mode():
        return build(FLUX)


def numeric(names):
    """What of the nodes changes numbers by more than rounding, in one order."""
    return tuple(name for name in NODES if name in names and name not in ("compile", "launcher"))


@pytest.fixture(scope="module")
def expected(model, nodes):
    """By what changes numbers: the sampled latent, and which steps were reused."""
    found = {}
    with torch.inference_mode():
        for key in {numeric(names) for names in SUBSETS}:
            patcher = wired(nodes, model, key)
            found[key] = sample(patcher, FLUX, cfg=4.0), reused(patcher)
    return found


def wired(nodes, model, names):
    for name in names:
        model = nodes[name](model)
    return model


@pytest.mark.parametrize("names", [order for names in SUBSETS for order in permutations(names)], ids="+".join)
def test_every_order_gives_the_same(nodes, model, expected, names):
    from para_core.adapters.comfy_compile import last_compile_report

    latent, steps = expected[numeric(names)]
    patcher = wired(nodes, model, names)
    result = sample(patcher, FLUX, cfg=4.0)
    assert relative(result, latent) <= ON_RANKS if "launcher" in names else torch.equal(result, latent)
    assert reused(patcher) == steps
    assert (steps is not None) == ("cache" in names) and (steps is None or sum(steps) == 4)
    if "compile" in names:
        report = last_compile_report(patcher)
        assert report.num_blocks == 5 and report.uncompiled == {}
        # Both kinds, plain and quantized: nothing more, whatever was wired before.
        assert report.num_compilations <= 4


def test_the_nodes_leave_the_model_as_it_was(model, expected):
    assert torch.equal(sample(model, FLUX, cfg=4.0), expected[()][0])
