"""A MODEL that samples elsewhere: what goes there and comes back, with a group of one rank in this process."""

import pytest
import torch
from fixtures_in_process import cancelled_once_asked, dying
from safetensors.torch import save_file
from tiny_models import TINY_MODELS, build, fbcache, host_version, relative, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = TINY_MODELS["flux"]


@pytest.mark.parametrize(("cfg", "num_tokens"), [(1.0, (7, 7)), (4.0, (7, 7)), (4.0, (9, 5))])
def test_the_result_is_the_same(elsewhere, cfg, num_tokens):
    model = build(FLUX)
    expected = sample(model, FLUX, cfg=cfg, num_tokens=num_tokens)
    assert torch.equal(sample(elsewhere(model), FLUX, cfg=cfg, num_tokens=num_tokens), expected)
    assert torch.equal(sample(model, FLUX, cfg=cfg, num_tokens=num_tokens), expected)


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
@pytest.mark.parametrize("first", ["cache", "launcher"])
def test_the_cache_decides_the_same_there(elsewhere, first, decision):
    model, reports = build(FLUX), []

    def cached(model):
        return fbcache(model, 100.0, reports.append, max_consecutive_hits=2, decision=decision)

    def wired(model):
        return elsewhere(cached(model)) if first == "cache" else cached(elsewhere(model))

    expected = sample(cached(model), FLUX, cfg=4.0)

    assert torch.equal(sample(wired(model), FLUX, cfg=4.0), expected)
    here, there = (report for report in reports if report.finished)
    assert there.conditionings == here.conditionings and there.num_block_calls == here.num_block_calls
    assert there.num_bytes == here.num_bytes > 0
    unmeasured = [record.reused and record.diff is None for record in here.conditionings["positive"]]
    assert any(unmeasured) == (decision == "prediction")


@pytest.mark.parametrize("behind", [False, True], ids=["before", "behind"])
def test_a_lora_and_another_strength(elsewhere, behind):
    model = build(FLUX)
    plain = sample(elsewhere(model), FLUX)
    for strength in (1.0, 0.5):
        expected = sample(lora(model, strength), FLUX)
        wired = lora(elsewhere(model), strength) if behind else elsewhere(lora(model, strength))
        assert torch.equal(sample(wired, FLUX), expected)
        assert not torch.equal(expected, plain)
    assert torch.equal(sample(elsewhere(model), FLUX), plain)
    assert elsewhere.group.calls.count("load") == 1, "a changed strength loads no weights"


@pytest.mark.parametrize("scheme", ["fp8_dynamic_per_row", "int8_weight_only"])
def test_quantized_weights(elsewhere, scheme):
    from para_core.adapters.comfy_quantization import apply_quantization

    quantized, _ = apply_quantization(lora(build(FLUX), 0.7), scheme)
    assert torch.equal(sample(elsewhere(quantized), FLUX), sample(quantized, FLUX))


def test_a_second_run_asks_for_nothing_but_the_calls(elsewhere):
    model = elsewhere(build(FLUX))
    first = sample(model, FLUX)
    elsewhere.group.calls.clear()
    assert torch.equal(sample(model, FLUX), first)
    assert set(elsewhere.group.calls) == {"missing", "begin", "forward", "end"}


@pytest.mark.parametrize(("keep", "calls"), [(True, ["missing", "begin"]), (False, ["missing", "begin", "end"])])
def test_a_run_that_is_cancelled_while_the_ranks_begin(elsewhere, keep, calls):
    """They do begin; what that put on their devices leaves them where it was not to stay."""
    group, model = elsewhere.group, elsewhere(build(FLUX), keep_loaded=keep)
    sample(model, FLUX, steps=1)
    group.calls.clear()
    with cancelled_once_asked(group, "begin"):
        sample(model, FLUX)
    assert group.calls[: len(calls)] == calls
    assert torch.equal(sample(model, FLUX), sample(build(FLUX), FLUX))


def test_ranks_that_free_their_devices_within_a_run_go_on_with_it(elsewhere):
    """As the host asks for when it loads another model between two calls; a LoRA is out of the weights then."""
    group, model = elsewhere.group, lora(build(FLUX), 0.7)
    cached = fbcache(elsewhere(model), 100.0, max_consecutive_hits=3)
    expected = sample(cached, FLUX, steps=8)
    original = group.call
    numbers = iter(range(1000))

    def without_memory(method, payload, **settings):
        if method == "forward" and next(numbers) == 4:
            group.service.unload({})
            assert model.loaded_size() == 0
        return original(method, payload, **settings)

    group.call = without_memory
    assert torch.equal(sample(cached, FLUX, steps=8), expected)


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_a_group_that_restarted_is_brought_to_where_it_was(elsewhere, decision):
    """With the cache, whose residuals went with the old processes: the calls so far are made again."""
    group, model = elsewhere.group, lora(build(FLUX), 0.7)
    cached = fbcache(elsewhere(model), 100.0, max_consecutive_hits=3, decision=decision)
    expected = sample(cached, FLUX, steps=8, cfg=4.0)
    dying(group, lambda number: number == 5)
    assert torch.equal(sample(cached, FLUX, steps=8, cfg=4.0), expected)
    assert group.calls.count("load") == 2


def test_what_a_run_came_to_is_kept_for_all_clones(elsewhere):
    from para_core.adapters.comfy_parallel import last_parallel_report
    from para_core.parallel_report import ParallelReport, RankReport

    model = elsewhere(build(FLUX), keep_loaded=False)
    assert last_parallel_report(model) is None and last_parallel_report(build(FLUX)) is None
    sample(lora(model, 0.5), FLUX)
    expected = ParallelReport("batch 1 x ring 1 x Ulysses 1", (RankReport("cpu", 3 * 2**20),), 0, True)
    assert last_parallel_report(model) == last_parallel_report(model.clone()) == expected


def test_restarts_of_a_run_are_counted_and_not_those_between_runs(elsewhere):
    from para_core.adapters.comfy_parallel import last_parallel_report

    group, model = elsewhere.group, elsewhere(build(FLUX))
    sample(model, FLUX)
    group.recover()
    original, numbers = group.call, iter(range(1000))

    def dies_twice(method, payload, **settings):
        if method == "forward" and next(numbers) in (1, 4):
            group.recover()
        return original(method, payload, **settings)

    group.call = dies_twice
    sample(model, FLUX, steps=6)
    assert last_parallel_report(model).num_restarts == 2
    group.call = original
    sample(model, FLUX)
    assert last_parallel_report(model).num_restarts == 0


@pytest.mark.parametrize(("decision", "num_made_again"), [("first_block", 2), ("prediction", 5)])
def test_of_a_run_only_the_calls_are_made_again_that_the_cache_depends_on(elsewhere, decision, num_made_again):
    group, model = elsewhere.group, build(FLUX)
    cached = fbcache(elsewhere(model), 100.0, decision=decision)
    expected = sample(cached, FLUX, steps=8, cfg=4.0)
    original, numbers = group.call, iter(range(1000))

    def dies_at_the_sixth(method, payload, **settings):
        if method == "forward" and next(numbers) == 5:
            group.calls.clear()
            group.recover()
            assert group.calls.count("forward") == num_made_again
        return original(method, payload, **settings)

    group.call = dies_at_the_sixth
    assert torch.equal(sample(cached, FLUX, steps=8, cfg=4.0), expected)


@pytest.mark.parametrize(("order", "max_hits"), [(0, 0), (0, 2), (1, 2), (2, 3)])
def test_a_restart_at_any_call_changes_nothing(elsewhere, order, max_hits):
    cached = fbcache(elsewhere(build(FLUX)), 100.0, order=order, max_consecutive_hits=max_hits)
    settings = {"steps": 9, "cfg": 4.0, "num_tokens": (9, 5), "sampler": "heun"}
    expected = sample(cached, FLUX, **settings)
    dying(elsewhere.group, lambda number: number % 2)
    assert torch.equal(sample(cached, FLUX, **settings), expected)


def test_calls_too_large_to_keep_let_the_cache_start_anew(elsewhere, monkeypatch, caplog):
    from para_core.adapters.comfy_kept_calls import KeptCalls

    monkeypatch.setattr(KeptCalls, "MAX_BYTES", 1000)
    group, reports = elsewhere.group, []
    cached = fbcache(elsewhere(build(FLUX)), 100.0, reports.append)
    dying(group, lambda number: number == 5)
    assert sample(cached, FLUX, steps=8).isfinite().all()
    assert [record.reused for record in reports[-1].conditionings["positive"]] == [
        number not in (0, 5) for number in range(8)
    ]
    assert "too large to keep" in caplog.text


def test_cancel_while_the_host_waits_for_its_memory_reaches_the_run(elsewhere):
    """The ranks may be busy with a call that was left."""
    import comfy.model_management as management

    sample(elsewhere(build(FLUX)), FLUX)
    session = elsewhere.group.recover.__self__
    management.interrupt_current_processing()
    try:
        session.detached(session.twin)
        assert "unload" not in elsewhere.group.calls
        with pytest.raises(management.InterruptProcessingException):
            management.throw_exception_if_processing_interrupted()
    finally:
        management.interrupt_current_processing(False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rank_whose_device_has_another_dtype_casts_its_weights(elsewhere, monkeypatch, tmp_path, dtype):
    """As cards of another generation have."""
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 sends the model itself, not how it is loaded")
    import comfy.model_management
    import comfy.sd

    file = tmp_path / "flux.safetensors"
    save_file(build(FLUX).model.diffusion_model.state_dict(), file)
    model = comfy.sd.load_diffusion_model(str(file))
    expected = sample(model, FLUX)
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **_: dtype)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *_, **__: None)
    result = sample(elsewhere(model), FLUX)
    (there,) = elsewhere.group.service._models.values()
    assert there.model.get_dtype() is dtype and model.model.get_dtype() is torch.float32
    assert 0 < relative(result, expected) < 0.05
