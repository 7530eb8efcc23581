"""Every family whose tokens can be split, on real ranks: the output is that of the model on one device."""

import pytest
from tiny_models import TINY_MODELS, host_version

pytestmark = pytest.mark.usefixtures("comfy")

TOLERANCE = 1e-6  # relative L2, float32: rounding in another order
# Prompts of two lengths are evaluated in two calls, equal ones in a call with two rows.
UNEQUAL, EQUAL = {"cfg": 4.0, "num_tokens": (9, 7)}, {"cfg": 4.0, "num_tokens": (7, 7)}
REFUSED = {
    "hidream", "ernie", "cosmos", "cosmos_predict2", "anima", "ltxav", "wan_vace", "wan_s2v", "wan_humo", "wan_animate",
    "wan_animate2", "wandancer", "sd15", "sdxl", "svd",
}  # fmt: skip
ODD_HEADS = {"mochi", "joyimage"}
SHARDED = [name for name in TINY_MODELS if name not in REFUSED]
MODELS = pytest.mark.parametrize("name", SHARDED)


@pytest.fixture
def compare(gloo_ranks, comfyui):
    """Sample a model on a mesh (batch, ring, ulysses) and on one device, and check what holds for all of them."""

    def run(name, mesh, *calls, **settings):
        skip_if_absent(name)
        batch, ring, ulysses = mesh
        group = gloo_ranks(batch * ring * ulysses, comfyui=comfyui)
        case = "adapters.sharding_cases.compare"
        results = group.run(case, model=name, mesh=mesh, calls=list(calls), timeout=120.0, **settings)
        for errors, here, alone in results:
            assert len(errors) >= len(calls)
            assert max(errors) <= TOLERANCE
            assert len(here) == len(alone)
        # Every token is on one rank, and no rank has two more than another.
        for total, *parts in zip(results[0][2], *(here for _, here, _ in results), strict=True):
            assert sum(parts) == batch * total
            assert max(parts) - min(parts) <= 1

    return run


def skip_if_absent(name):
    if host_version() < tuple(map(int, TINY_MODELS[name].since.split("."))):
        pytest.skip(f"ComfyUI {'.'.join(map(str, host_version()))} has no {TINY_MODELS[name].title}")


@MODELS
@pytest.mark.parametrize("mesh", [(1, 2, 1), (1, 1, 2)], ids=["ring", "ulysses"])
def test_two_ranks_equal_one(compare, name, mesh):
    if mesh == (1, 1, 2) and name in ODD_HEADS:
        pytest.skip("Ulysses divides heads, and the tiny one has an odd number of them")
    compare(name, mesh, UNEQUAL, EQUAL)


@pytest.mark.parametrize("name", ["flux", "wan", "qwen_edit", "hunyuan_video"])
def test_four_ranks_as_ring_of_ulysses_equal_one(compare, name):
    compare(name, (1, 2, 2), UNEQUAL)
