"""Compile Model on the launcher's ranks: as exact as on one device, compiled once, whatever comes between runs."""

import pytest
import torch
from tiny_models import TINY_MODELS, build, fbcache, relative, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")
FLUX, WAN = TINY_MODELS["flux"], TINY_MODELS["wan"]
EXACT = 1e-5  # of float32, by other kernels and in another order; as on one device


@pytest.fixture
def compiled(tmp_path):
    from para_core.adapters.comfy_compile import apply_compile
    from para_core.compile_config import CompileConfig

    return lambda model, listener=None, **config: apply_compile(
        model, CompileConfig(**config), directory=tmp_path, listener=listener
    )


def report_of(patcher):
    from para_core.adapters.comfy_compile import last_compile_report

    return last_compile_report(patcher)


@pytest.mark.parametrize(
    ("tiny", "backend", "settings"),
    [
        (FLUX, "inductor", {"ulysses_degree": 2}),
        (FLUX, "eager", {"ring_degree": 2}),
        (WAN, "eager", {"ulysses_degree": 2}),
        (WAN, "eager", {"ring_degree": 2}),
    ],
    ids=["flux-ulysses", "flux-ring", "wan-ulysses", "wan-ring"],
)
def test_compiled_blocks_give_the_same_in_one_piece(compiled, on_two_ranks, tiny, backend, settings):
    model, reports = build(tiny), []
    config = {"fullgraph": True, "backend": backend}
    here = compiled(model, **config | {"backend": "eager"})
    there = on_two_ranks(compiled(model, reports.append, **config), **settings)
    for num_tokens in ((7, 7), (9, 5), (7, 7)):
        call = {"cfg": 4.0, "num_tokens": num_tokens}
        assert relative(sample(there, tiny, **call), sample(model, tiny, **call)) <= EXACT
        sample(here, tiny, **call)
    report, of_one = report_of(there), report_of(here)
    assert report.uncompiled == {} and report.finished
    assert (report.num_kinds, report.num_blocks) == (of_one.num_kinds, of_one.num_blocks)
    assert 0 < report.num_compilations <= of_one.num_compilations and report.compiled == (), "no run is compiled twice"
    assert any(report.compiled for report in reports) and reports[-1] == report
    assert report.cache_bytes > 0 or backend != "inductor"


def test_a_lora_and_the_cache_compile_nothing_anew(compiled, on_two_ranks):
    model = build(FLUX)
    sample(on_two_ranks(compiled(model, backend="eager")), FLUX, cfg=4.0)
    for strength in (0.7, 0.3):
        changed = lora(model, strength)
        settings = {"max_consecutive_hits": 2}
        expected = sample(fbcache(changed, 100.0, **settings), FLUX, cfg=4.0)
        patcher = fbcache(on_two_ranks(compiled(changed, backend="eager")), 100.0, **settings)
        assert relative(sample(patcher, FLUX, cfg=4.0), expected) <= EXACT
        assert report_of(patcher).compiled == ()


@pytest.mark.parametrize(
    ("settings", "num_tokens"), [({"ring_degree": 2}, (9, 5)), ({"batch_parallel": "on"}, (7, 7))], ids=["ring", "rows"]
)
def test_one_scale_for_all_ranks_inside_compiled_blocks(compiled, on_two_ranks, settings, num_tokens):
    """The tolerance is that of test_quantized_blocks_compute_as_on_one_device, for its reasons."""
    from para_core.adapters.comfy_quantization import apply_quantization

    model, call = build(FLUX), {"cfg": 4.0, "num_tokens": num_tokens, "steps": 1}
    quantized, _ = apply_quantization(model, "fp8_dynamic_per_tensor")
    here = sample(quantized, FLUX, **call)
    patcher = on_two_ranks(compiled(quantized, fullgraph=True, backend="eager"), **settings)
    there = sample(patcher, FLUX, **call)
    assert relative(there, here) <= 0.5 * relative(here, sample(model, FLUX, **call))
    assert torch.equal(sample(patcher, FLUX, **call), there)
    report = report_of(patcher)
    assert report.uncompiled == {} and report.compiled == () and report.num_compilations


@pytest.mark.parametrize(
    ("compiling", "message"),
    [
        ({"scope": "model"}, 'Set scope to "blocks"'),
        ({"mode": "reduce-overhead"}, 'Set backend "inductor" and mode "default"'),
    ],
)
def test_what_cannot_run_on_ranks_is_refused(compiled, on_two_ranks, compiling, message):
    with pytest.raises(ValueError, match=message):
        sample(on_two_ranks(compiled(build(FLUX), **compiling)), FLUX)
