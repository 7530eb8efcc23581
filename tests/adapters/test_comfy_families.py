"""Every model that the cache serves, in the real ComfyUI: exact where nothing is reused, the same again where it is.

A new family is one file in para_core/families and one entry in tests/tiny_models; these tests then cover it.
"""

from dataclasses import replace

import pytest
import torch
from tiny_models import ALWAYS, NEVER, TINY_MODELS, all_foreseen, build, fbcache, relative, sample, with_sampler

pytestmark = pytest.mark.usefixtures("comfy")

MODELS = pytest.mark.parametrize("tiny", TINY_MODELS.values(), ids=TINY_MODELS)


def called_twice(outputs):
    """A sampler that puts two outputs of one call into the list."""

    def sampler(model, x, sigmas):
        kept = x.clone()
        outputs.extend((model(x, sigmas[0]).clone(), model(x, sigmas[0]).clone()))
        assert torch.equal(x, kept), "the model's input was written to"

    return sampler


@MODELS
def test_the_family_is_found_and_names_all_blocks(tiny):
    from para_core.families import family_of

    model = build(tiny).model.diffusion_model
    family = family_of(model)
    assert family.name == tiny.family
    assert sum(len(stack.blocks_in(model)) for stack in family.stacks) > 2


@MODELS
@pytest.mark.parametrize(("cfg", "num_tokens"), [(1.0, (7, 7)), (4.0, (9, 5))], ids=["cfg 1", "cfg 4 unequal"])
def test_threshold_0_is_bit_equal(tiny, cfg, num_tokens):
    model = build(tiny)
    expected = sample(model, tiny, steps=3, cfg=cfg, num_tokens=num_tokens)
    assert expected.isfinite().all()
    assert torch.equal(sample(fbcache(model, NEVER), tiny, steps=3, cfg=cfg, num_tokens=num_tokens), expected)


@MODELS
@pytest.mark.parametrize(
    ("cfg", "num_tokens", "batch"),
    [(1.0, (7, 7), 1), (4.0, (7, 7), 2), (4.0, (9, 5), 1)],
    ids=["cfg 1", "cfg 4 batch 2", "cfg 4 unequal"],
)
def test_hit_on_identical_inputs_reproduces_the_output(tiny, cfg, num_tokens, batch):
    """At cfg 4: were cond and uncond ever exchanged, guidance would come out mirrored."""
    outputs, reports = [], []

    model = build(tiny)
    settings = {"cfg": cfg, "num_tokens": num_tokens, "batch": batch}
    with_sampler(fbcache(model, 0.01, reports.append), tiny, called_twice(outputs), **settings)
    with_sampler(model, tiny, called_twice(outputs), **settings)
    computed, reused, expected, _ = outputs
    assert torch.equal(computed, expected)
    records = reports[-1].conditionings
    assert {name: [record.reused for record in found] for name, found in records.items()} == {
        name: [False, True] for name in (["positive"] if cfg == 1 else ["positive", "negative"])
    }
    assert relative(reused, computed, tiny) <= 1e-5


@MODELS
@pytest.mark.parametrize("num_tokens", [(7, 7), (9, 5)], ids=["batched", "unequal"])
def test_hit_on_identical_inputs_without_block_0_reproduces_the_output(tiny, num_tokens):
    from para_core.families import family_of

    outputs, reports = [], []

    model = build(tiny)
    stacks = family_of(model.model.diffusion_model).stacks
    num_blocks = sum(len(stack.blocks_in(model.model.diffusion_model)) for stack in stacks)
    settings = {"cfg": 4.0, "num_tokens": num_tokens}
    with all_foreseen():
        with_sampler(
            fbcache(model, 0.01, reports.append, decision="prediction"), tiny, called_twice(outputs), **settings
        )
    with_sampler(model, tiny, called_twice(outputs), **settings)
    computed, reused, expected, _ = outputs
    assert torch.equal(computed, expected)
    assert reports[-1].num_block_calls == num_blocks * (reports[-1].num_calls - reports[-1].num_reused_calls)
    for records in reports[-1].conditionings.values():
        assert [(record.reused, record.diff) for record in records] == [(False, None), (True, None)]
    assert relative(reused, computed, tiny) <= 1e-5


@MODELS
def test_conditionings_are_cut_from_a_batch(tiny):
    """The host may batch cond with uncond at one step and split them at the next, by free memory."""
    import comfy.patcher_extension

    calls, reports = [], []

    def mixed(executor, model, conds, x, timestep, options):
        order = [conds, [conds[0], None], [None, conds[1]], conds][len(calls)]
        calls.append([out.clone() for out in executor(model, order, x, timestep, options)])
        return [torch.zeros_like(x) if cond is None else out for cond, out in zip(order, calls[-1], strict=True)]

    model = fbcache(build(tiny), 0.01, reports.append)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.CALC_COND_BATCH, "test", mixed)
    with_sampler(
        model, tiny, lambda model, x, sigmas: [model(x, sigmas[0]) for _ in range(4)], cfg=4.0, num_tokens=(7, 7)
    )
    assert reports[-1].num_calls == 4, "the conditionings were not batched, so this test shows nothing"
    assert reports[-1].num_reused_calls == 3
    both, positive, negative, again = calls
    assert relative(*both, tiny) > 1e-2
    for first, later in ((both[0], positive[0]), (both[1], negative[1]), (both[0], again[0]), (both[1], again[1])):
        assert relative(later, first, tiny) <= 1e-5


@MODELS
def test_upstream_model_is_unchanged_and_runs_repeat(tiny):
    model = build(tiny)
    before = sample(model, tiny, steps=4, cfg=4.0)
    cached = fbcache(model, ALWAYS)
    first = sample(cached, tiny, steps=4, cfg=4.0)
    assert relative(first, before, tiny) > 1e-3, "reuse changes nothing, so this test shows nothing"
    assert torch.equal(sample(model, tiny, steps=4, cfg=4.0), before)
    assert torch.equal(sample(cached, tiny, steps=4, cfg=4.0), first)


@MODELS
def test_another_size_equals_a_fresh_build(tiny):
    used = fbcache(build(tiny), ALWAYS, max_consecutive_hits=2)
    sample(used, tiny, steps=4)
    (*lead, width), *others = tiny.parts
    wide = replace(tiny, latent=((*lead, width + 4), *others) if others else (*lead, width + 4))
    fresh = fbcache(build(tiny), ALWAYS, max_consecutive_hits=2)
    assert torch.equal(sample(used, wide, steps=4), sample(fresh, wide, steps=4))
