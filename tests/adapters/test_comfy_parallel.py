"""The Context-Parallel Launcher's MODEL on real processes: two ranks on gloo, ComfyUI's own sampler in this one."""

import copy

import pytest
from tiny_models import TINY_MODELS, build, fbcache, relative, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")
FLUX, WAN = TINY_MODELS["flux"], TINY_MODELS["wan"]
EXACT = 1e-6  # float32 rounding: sums over keys in another order


@pytest.fixture
def parallel(groups):
    """Makes a MODEL sample on two ranks."""
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.parallel_config import ParallelConfig

    return lambda model, **settings: apply_parallel(model, ParallelConfig(("cpu", "cpu"), **settings), groups.session)


@pytest.mark.parametrize("tiny", [FLUX, WAN], ids=["flux", "wan"])
@pytest.mark.parametrize("settings", [{"ulysses_degree": 2}, {"ring_degree": 2}], ids=["ulysses", "ring"])
@pytest.mark.parametrize(("cfg", "num_tokens"), [(1.0, (7, 7)), (4.0, (9, 5))])
def test_the_result_is_that_of_one_device(parallel, tiny, settings, cfg, num_tokens):
    model = build(tiny)
    expected = sample(model, tiny, cfg=cfg, num_tokens=num_tokens)
    assert relative(sample(parallel(model, **settings), tiny, cfg=cfg, num_tokens=num_tokens), expected) <= EXACT


def test_loras_and_the_cache(parallel):
    """Decisions are made together: were they not, the ranks would wait for each other."""
    model, reports = lora(build(FLUX), 0.7), []
    settings = {"max_consecutive_hits": 2}
    expected = sample(fbcache(model, 100.0, reports.append, **settings), FLUX, cfg=4.0)
    result = sample(fbcache(parallel(model), 100.0, reports.append, **settings), FLUX, cfg=4.0)
    assert relative(result, expected) <= EXACT
    copied = copy.deepcopy(parallel(model).model_options)  # ComfyUI 0.3 does it with every clone
    assert "parallel" in copied["transformer_options"]["para_accelerate"]
    here, there = (report for report in reports if report.finished)
    assert there.num_block_calls == here.num_block_calls < here.num_block_calls_baseline


@pytest.mark.parametrize("scheme", ["fp8_weight_only", "fp8_dynamic_per_row", "fp8_dynamic_per_tensor"])
def test_quantized_blocks_err_as_on_one_device(parallel, scheme):
    """Rounded activations may fall on the other side of a rounding step by float32's own rounding; per tensor each rank
    scales its own tokens, which is no coarser."""
    from para_core.adapters.comfy_quantization import apply_quantization

    model = build(FLUX)
    quantized, _ = apply_quantization(model, scheme)
    call = {"cfg": 4.0, "num_tokens": (9, 5)}
    exact, here = sample(model, FLUX, **call), sample(quantized, FLUX, **call)
    there = sample(parallel(quantized), FLUX, **call)
    own_error = relative(here, exact)
    assert 1e-3 < own_error < 0.2
    assert relative(there, here) <= (EXACT if scheme == "fp8_weight_only" else own_error)
    assert relative(there, exact) <= 1.2 * own_error
