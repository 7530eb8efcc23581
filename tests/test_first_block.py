"""Model calls through the cache, on a toy model of two stacks with in-place blocks; no host involved."""

import math

import pytest
import torch
from toy_model import Toy, call, family

from para_core.cache_run import CacheRun
from para_core.residual_cache import CacheConfig
from para_core.run_state import Step

ORDERS = pytest.mark.parametrize("order", [("txt", "img"), ("img", "txt")], ids="-".join)


@ORDERS
def test_computed_call_is_bit_equal_and_reused_one_reproduces_it(order):
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(2, 7, 4), torch.randn(2, 3, 4)
    expected = model(img, txt)
    assert torch.equal(call(run, model, img, txt), expected)
    torch.testing.assert_close(call(run, model, img, txt), expected)
    report = run.report()
    assert (report.num_calls, report.num_reused_calls) == (2, 1)
    assert (report.num_block_calls, report.num_block_calls_baseline) == (6, 10)
    assert [block.calls for block in model.doubles] == [3, 2]


@ORDERS
def test_what_the_host_adds_between_blocks_counts_once(order):
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    expected = model(img, txt, control=0.2)
    assert not torch.allclose(expected, model(img, txt))
    for _ in range(2):
        torch.testing.assert_close(call(run, model, img, txt, control=0.2), expected)
    assert run.report().num_reused_calls == 1


def test_conditionings_are_cut_from_the_batch_and_stay_apart():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(2, 7, 4), torch.randn(2, 3, 4)
    expected = call(run, model, img, txt, keys=("b", "a"))
    alone = call(run, model, img[1:], txt[1:], keys=("a",))
    assert run.report().num_reused_calls == 1
    torch.testing.assert_close(alone, expected[1:])
    swapped = call(run, model, img.flip(0), txt.flip(0), keys=("a", "b"))
    assert run.report().num_reused_calls == 2
    torch.testing.assert_close(swapped, expected.flip(0))


def test_one_conditioning_that_changed_computes_the_whole_batch():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(2, 7, 4), torch.randn(2, 3, 4)
    call(run, model, img, txt, keys=("a", "b"))
    img[1] += 1
    assert torch.equal(call(run, model, img, txt, keys=("a", "b")), model(img, txt))


def test_threshold_0_never_reuses_but_shows_the_curve():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.0))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    for step in range(3):
        call(run, model, img + step, txt, step=step)
    (records,) = run.report().conditionings.values()
    assert [record.reused for record in records] == [False] * 3
    assert records[0].diff is None and records[1].diff > 0


def test_a_call_that_fails_leaves_the_blocks_and_the_run_as_they_were():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(10.0))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    expected = call(run, model, img, txt)
    broken = model.singles[1].scale
    model.singles[1].scale = "not a number"
    with pytest.raises(TypeError):
        call(run, model, img + 5, txt, allowed=False)
    model.singles[1].scale = broken
    assert all("forward" not in block.__dict__ for block in (*model.doubles, *model.singles))
    torch.testing.assert_close(call(run, model, img, txt), expected)
    assert run.report().num_calls == 2


def test_states_of_passes_that_ended_are_dropped():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    for step in range(40):
        call(run, model, img, txt, keys=(f"short-lived {step}",), step=step)
        call(run, model, img, txt, keys=("lasting",), step=step)
    one_state = 2 * img.numel() * img.element_size()
    assert run.report().num_bytes <= (CacheRun.STALE_STEPS + 3) * one_state


def test_a_model_of_one_block_is_left_alone():
    order = ("txt", "img")
    model, run = Toy(order, num_double=1, num_single=0), CacheRun(family(order), CacheConfig(10.0))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    for _ in range(2):
        assert torch.equal(call(run, model, img, txt), model(img, txt))
    assert run.report().num_reused_calls == 0


def test_a_call_is_reused_exactly_where_the_change_is_below_the_threshold():
    order = ("txt", "img")
    model = Toy(order)
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    run = CacheRun(family(order), CacheConfig(0.05))
    for step in range(20):
        call(run, model, img * (1 + 0.02 * step), txt, step=step)
    (records,) = run.report().conditionings.values()
    assert {record.reused for record in records} == {True, False}
    assert all(record.reused == (record.diff < 0.05) for record in records[1:])


def foreseeing_run(order, model, img, txt, **kwargs):
    """A run whose third model call, of the same inputs at the next time, is foreseen: the first one is computed, the
    second one measured."""
    run = CacheRun(family(order), CacheConfig(0.01, decision="prediction"))
    for step in range(2):
        call(run, model, img, txt, step=step, at=1 - 0.1 * step, **kwargs)
    return run


@ORDERS
def test_a_foreseen_call_runs_no_block_and_reproduces_the_output(order):
    model = Toy(order)
    img, txt = torch.randn(2, 7, 4), torch.randn(2, 3, 4)
    expected = model(img, txt, control=0.2)
    run = foreseeing_run(order, model, img, txt, keys=("a", "b"), control=0.2)
    before = [block.calls for block in (*model.doubles, *model.singles)]
    kept = img.clone()
    found = call(run, model, img, txt, keys=("a", "b"), step=2, at=0.8, control=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert [block.calls for block in (*model.doubles, *model.singles)] == before
    assert torch.equal(img, kept)
    report = run.report()
    assert (report.num_calls, report.num_reused_calls) == (3, 2)
    assert (report.num_block_calls, report.num_block_calls_baseline) == (5 + 1, 15)
    for records in report.conditionings.values():
        assert [(record.reused, record.diff is None) for record in records] == [
            (False, True),
            (True, False),
            (True, True),
        ]


def test_a_foreseen_call_leaves_what_block_0_was_given_as_it_was():
    """The host adds to what block 0 returns; a branch may still need what went in."""
    order = ("txt", "img")
    model = Toy(order)
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    run = foreseeing_run(order, model, img, txt)
    with run.call(run.family, [2, 3], {"a": "a"}, Step(2, 1.0, at=0.8)) as cached:
        returned = cached.block(0, 0, {"img": img, "txt": txt}, compute=pytest.fail)
        kept = img.clone()
        returned[0].add_(1)
        assert torch.equal(img, kept)


CIRCUMSTANCES = {
    "not allowed": ({}, {"allowed": False}),
    "warmup": ({"warmup_steps": 3}, {}),
    "other size": ({}, {"num_tokens": 8}),
    "the same time again": ({}, {"at": 1.0}),
    "another conditioning": ({}, {"keys": ("b",)}),
    "weights or patches change": ({}, {"foreseeable": False}),
    "the last step": ({}, {"num_steps": 3}),
    "one of the last steps": ({}, {"step": 26, "num_steps": 28}),
}


@pytest.mark.parametrize("name", CIRCUMSTANCES)
def test_block_0_runs_where_nothing_can_be_foreseen(name):
    (settings, where), order = CIRCUMSTANCES[name], ("txt", "img")
    where = {"step": 2, "at": 0.8, **where}
    img, txt = torch.randn(1, where.pop("num_tokens", 7), 4), torch.randn(1, 3, 4)
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01, decision="prediction", **settings))
    for step in range(2):
        call(run, model, img[:, :7], txt, step=step, at=1 - 0.1 * step)
    before = model.doubles[0].calls
    call(run, model, img, txt, **where)
    assert model.doubles[0].calls == before + 1


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_what_is_added_between_the_blocks_starts_and_ends_with_a_computed_step(decision):
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(100.0, decision=decision))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    added = [(), (0.0,), (1.0,), (1.9,), (1.9, 0.0), (1.9, 1e-9), (1.9, 0.0), (0.0, 0.0), (), (math.nan,), (1.0,)]
    for step, controlled in enumerate(added):
        call(run, model, img, txt, step=step, at=1 - 0.05 * step, controlled=controlled)
    (records,) = run.report().conditionings.values()
    computed = [step for step, record in enumerate(records) if not record.reused]
    assert computed == [0, 2, 4, 5, 6, 7, 9, 10]


def test_hits_in_a_row_are_counted_whether_measured_or_not():
    order = ("txt", "img")
    model, run = Toy(order), CacheRun(family(order), CacheConfig(0.01, decision="prediction", max_consecutive_hits=2))
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    for step in range(8):
        call(run, model, img, txt, step=step, at=1 - 0.1 * step)
    (records,) = run.report().conditionings.values()
    assert [record.reused for record in records] == [False, True, True, False, True, True, False, True]
    assert sum(record.reused and record.diff is None for record in records) >= 2


def test_a_patched_block_0_is_called_at_every_step():
    order = ("txt", "img")
    model = Toy(order)
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    run, calls = foreseeing_run(order, model, img, txt), []

    def compute():
        calls.append(1)
        return model.doubles[0](img.clone(), txt.clone())

    with run.call(run.family, [2, 3], {"a": "a"}, Step(2, 1.0, at=0.8)) as cached:
        cached.block(0, 0, {"img": img, "txt": txt}, compute, patched=True)
    assert calls and cached.measured


@pytest.mark.parametrize(("decision", "factor"), [("first_block", 1), ("prediction", 2.5)])
def test_the_estimate_of_the_last_step_counts_more_with_prediction(decision, factor):
    order = ("txt", "img")
    model, diffs = Toy(order), {}
    img, txt = torch.randn(1, 7, 4), torch.randn(1, 3, 4)
    for num_steps in (0, 4):
        run = CacheRun(family(order), CacheConfig(0.01, decision=decision))
        for step in range(4):
            call(run, model, img + step, txt, step=step, at=1 - 0.1 * step, num_steps=num_steps, allowed=False)
        (records,) = run.report().conditionings.values()
        diffs[num_steps] = [record.diff for record in records[1:]]
    assert diffs[4] == pytest.approx([*diffs[0][:2], factor * diffs[0][2]])
