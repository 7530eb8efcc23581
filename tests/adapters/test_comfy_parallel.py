"""The Context-Parallel Launcher's MODEL on real processes: two ranks on gloo, ComfyUI's own sampler in this one."""

import copy
import os
import signal

import pytest
import torch
from tiny_models import TINY_MODELS, build, conditioning, fbcache, flux_control, relative, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")
FLUX, WAN = TINY_MODELS["flux"], TINY_MODELS["wan"]
EXACT = 1e-6  # float32 rounding: sums over keys in another order
ULYSSES, RING = ({"ulysses_degree": 2}, (9, 5)), ({"ring_degree": 2}, (9, 5))
ROWS = ({"batch_parallel": "on"}, (7, 7))  # prompts of one length are two rows of a call


@pytest.mark.parametrize("tiny", [FLUX, WAN], ids=["flux", "wan"])
@pytest.mark.parametrize("settings", [{"ulysses_degree": 2}, {"ring_degree": 2}], ids=["ulysses", "ring"])
@pytest.mark.parametrize(("cfg", "num_tokens"), [(1.0, (7, 7)), (4.0, (9, 5))])
def test_the_result_is_that_of_one_device(on_two_ranks, tiny, settings, cfg, num_tokens):
    model = build(tiny)
    expected = sample(model, tiny, cfg=cfg, num_tokens=num_tokens)
    assert relative(sample(on_two_ranks(model, **settings), tiny, cfg=cfg, num_tokens=num_tokens), expected) <= EXACT


@pytest.mark.parametrize("batch_parallel", ["on", "off"])
@pytest.mark.parametrize("cache", [{}, {"decision": "prediction", "order": 1}], ids=["first block", "prediction"])
def test_loras_and_the_cache(on_two_ranks, cache, batch_parallel):
    """Decisions are made together: were they not, the ranks would wait for each other, or part by their prompts."""
    model, reports = lora(build(FLUX), 0.7), []
    threshold, settings = (100.0, {"max_consecutive_hits": 2}) if not cache else (0.95, {})
    call = {"cfg": 4.0, "steps": 10, "num_tokens": (7, 7)}
    expected = sample(fbcache(model, threshold, reports.append, **settings, **cache), FLUX, **call)
    on_ranks = on_two_ranks(model, batch_parallel=batch_parallel)
    result = sample(fbcache(on_ranks, threshold, reports.append, **settings, **cache), FLUX, **call)
    assert relative(result, expected) <= EXACT
    here, there = (report for report in reports if report.finished)
    assert there.num_block_calls == here.num_block_calls < here.num_block_calls_baseline
    for name, records in here.conditionings.items():
        ours, theirs = ([(one.step, one.reused) for one in found] for found in (there.conditionings[name], records))
        assert ours == theirs
        diffs = [[one.diff for one in found if one.diff] for found in (there.conditionings[name], records)]
        assert diffs[0] == pytest.approx(diffs[1], rel=1e-3)


@pytest.mark.parametrize("cause", ["memory", "control"])
@pytest.mark.parametrize("cache", [None, {"max_consecutive_hits": 2}], ids=["plain", "cache"])
def test_rows_that_come_one_by_one_are_spread_by_their_tokens(on_two_ranks, monkeypatch, cause, cache):
    """The host puts two prompts into one call only where it has the memory, and what else they need is alike."""
    import comfy.model_management

    model, said = build(FLUX), []
    call = {"cfg": 4.0, "num_tokens": (7, 7)}
    if cause == "control":
        call["positive"] = conditioning(FLUX, 1, 7, control=flux_control())
    else:
        get_free_memory = comfy.model_management.get_free_memory
        monkeypatch.setattr(
            comfy.model_management,
            "get_free_memory",
            lambda device=None, torch_free_too=False: (
                get_free_memory(device, torch_free_too) if torch_free_too else 1000
            ),
        )
    wired = [model, on_two_ranks(model, listener=said.append)]
    if cache is not None:
        wired = [fbcache(one, 100.0, **cache) for one in wired]
    expected, result = (sample(one, FLUX, **call) for one in wired)
    assert relative(result, expected) <= EXACT
    assert [notice.mesh for notice in said] == ["batch 1 x ring 1 x Ulysses 2"]


def test_the_host_is_told_of_the_memory_of_all_ranks(on_two_ranks, monkeypatch):
    """So that it puts prompts into one call, of which each rank computes a part."""
    from comfy.model_patcher import ModelPatcher

    if not hasattr(ModelPatcher, "get_free_memory"):
        pytest.skip("this ComfyUI does not ask the MODEL; 0.33 does")
    model, said = build(FLUX), []
    # That of one row is enough for half of what two rows need.
    needed = 1.5 * model.memory_required([2, *FLUX.latent])
    monkeypatch.setattr(ModelPatcher, "get_free_memory", lambda self, device: 0.6 * needed)
    sample(on_two_ranks(model, listener=said.append), FLUX, cfg=4.0, num_tokens=(7, 7), steps=1)
    assert [notice.mesh for notice in said] == ["batch 2 x ring 1 x Ulysses 1"]


def test_what_each_rank_lacks_of_a_model_is_known(on_two_ranks, groups):
    from para_core.parallel_config import ParallelConfig

    model = build(FLUX)
    session, size = groups.session(ParallelConfig(("cpu", "cpu"))), model.model_size()
    found = [session.missing(model)]
    for keep_loaded in (True, False):
        sample(on_two_ranks(model, keep_loaded=keep_loaded), FLUX, steps=1)
        found.append(session.missing(model))
    whole = pytest.approx([size, size], rel=1e-3)  # of the diffusion model alone
    assert found == [whole, [0, 0], whole]


def test_options_survive_being_copied(on_two_ranks):
    """ComfyUI 0.3 does it with every clone."""
    copied = copy.deepcopy(on_two_ranks(build(FLUX)).model_options)
    assert "parallel" in copied["transformer_options"]["para_accelerate"]


def quantized(model, scheme):
    from para_core.adapters.comfy_quantization import apply_quantization

    return apply_quantization(model, scheme)[0]


@pytest.mark.parametrize("scheme", ["fp8_weight_only", "fp8_dynamic_per_row", "fp8_dynamic_per_tensor"])
@pytest.mark.parametrize(("settings", "num_tokens"), [ULYSSES, RING, ROWS], ids=["ulysses", "ring", "rows"])
def test_quantized_blocks_compute_as_on_one_device(on_two_ranks, settings, num_tokens, scheme):
    """Of one step, as long as float32's rounding makes few codes flip.

    A code on the edge becomes its neighbour by an error of 1e-7, and all that follows differs a little: up to 0.35 of
    the scheme's own error were measured, with a scale for each token. Where every rank scales by its own tokens, it is
    0.7 and more. After six steps one cannot be told from the other.
    """
    model, call = build(FLUX), {"cfg": 4.0, "num_tokens": num_tokens, "steps": 1}
    here = sample(quantized(model, scheme), FLUX, **call)
    own_error = relative(here, sample(model, FLUX, **call))
    assert 0.03 < own_error < 0.1
    there = sample(on_two_ranks(quantized(model, scheme), **settings), FLUX, **call)
    assert relative(there, here) <= (EXACT if scheme == "fp8_weight_only" else 0.5 * own_error)


def test_reused_calls_leave_out_the_same_layers_on_every_rank(on_two_ranks):
    """Rows apart: were a layer called on one rank only, it would wait there for the other's scale."""
    model, reports = quantized(build(FLUX), "fp8_dynamic_per_tensor"), []
    call = {"cfg": 4.0, "num_tokens": ROWS[1]}
    for patcher in (model, on_two_ranks(model, **ROWS[0])):
        assert sample(fbcache(patcher, 100.0, reports.append, max_consecutive_hits=2), FLUX, **call).isfinite().all()
    here, there = (report for report in reports if report.finished)
    assert there.num_block_calls == here.num_block_calls < here.num_block_calls_baseline


def test_no_code_flips_where_nothing_is_added_up_in_another_order(on_two_ranks):
    """Ulysses computes each head as one device does. Where the other sums do not depend on the number of tokens either
    (the CPU's own affair), the whole run is bit-equal."""

    def is_equal(model):
        call = {"cfg": 4.0, "num_tokens": (9, 5), "steps": 3}
        return torch.equal(sample(on_two_ranks(model, ulysses_degree=2), WAN, **call), sample(model, WAN, **call))

    model = build(WAN)
    if not is_equal(model):
        pytest.skip("this CPU adds up in another order for fewer tokens")
    for scheme in ("int8_dynamic_per_row", "fp8_dynamic_per_row", "fp8_dynamic_per_tensor"):
        assert is_equal(quantized(model, scheme)), scheme


def test_four_ranks_with_everything_on_and_one_of_them_killed(comfy):
    """Ring of 2 x Ulysses 2: LoRA, ControlNet, int8 weights and the cache, at cfg 4 with unequal prompts."""
    from comfy.patcher_extension import WrappersMP

    from para_core.adapters.comfy_groups import Groups
    from para_core.adapters.comfy_parallel import apply_parallel
    from para_core.adapters.comfy_quantization import apply_quantization
    from para_core.parallel_config import ParallelConfig

    quantized, _ = apply_quantization(lora(build(FLUX), 0.7), "int8_weight_only")
    call = {"cfg": 4.0, "num_tokens": (9, 5), "positive": conditioning(FLUX, 1, 9, control=flux_control())}
    cache = {"max_consecutive_hits": 2, "decision": "prediction", "order": 1}
    reports = []
    expected = sample(fbcache(quantized, 100.0, reports.append, **cache), FLUX, **call)
    config, groups = ParallelConfig(("cpu",) * 4, ring_degree=2, ulysses_degree=2), Groups()
    try:
        model = fbcache(apply_parallel(quantized, config, groups.session), 100.0, reports.append, **cache)
        result = sample(model, FLUX, **call)
        assert relative(result, expected) <= EXACT
        here, there = (report for report in reports if report.finished)
        assert there.num_block_calls == here.num_block_calls < here.num_block_calls_baseline

        calls = iter(range(1000))

        def kills_a_rank(executor, *args, **kwargs):
            if next(calls) == 7:
                os.kill(groups.state()[0]["ranks"][2]["pid"], signal.SIGKILL)
            return executor(*args, **kwargs)

        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "kills", kills_a_rank)
        assert torch.equal(sample(model, FLUX, **call), result)
        assert groups.state()[0]["restarts"] == 1 and next(calls) > 8
    finally:
        groups.close()
