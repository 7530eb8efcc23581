"""What changes in the middle of a run beside the time: the cache sees it, also where block 0 would not have run."""

import pytest
import torch
from tiny_models import ALWAYS, FLUX, all_foreseen, build, conditioning, fbcache, flux_control, sample

pytestmark = pytest.mark.usefixtures("comfy")


def records(model, decision="prediction", **settings):
    """Of the positive, of a run in which every step is foreseen to be reused that may be."""
    reports = []
    with all_foreseen():
        sample(fbcache(model, ALWAYS, reports.append, decision=decision), FLUX, steps=6, **settings)
    return reports[-1].conditionings["positive"]


def test_by_itself_only_the_last_step_is_measured():
    *found, last = records(build(FLUX))
    assert [(record.reused, record.diff) for record in found] == [(False, None)] + 4 * [(True, None)]
    assert last.diff is not None


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_a_controlnet_that_starts_and_ends_is_computed_where_it_does(decision):
    control, asked = flux_control(), []
    answer = control.get_control

    def in_the_middle(*args):
        asked.append(args)
        return answer(*args) if len(asked) in (3, 4) else None

    control.get_control = in_the_middle
    found = records(build(FLUX), decision, positive=conditioning(FLUX, 1, control=control))
    assert [record.reused for record in found] == [False, True, False, True, False, True]


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_a_controlnet_that_becomes_stronger_or_is_joined_by_another_is_computed(decision):
    control, asked = flux_control(), []
    answer = control.get_control

    def changing(*args):
        asked.append(args)
        found = answer(*args)
        if len(asked) in (3, 4):  # a strength that is scheduled
            return {kind: [None if one is None else 5 * one for one in of_kind] for kind, of_kind in found.items()}
        if len(asked) >= 5:  # a second one, which acts on other blocks
            found["output"][1] = found["output"][0]
        return found

    control.get_control = changing
    found = records(build(FLUX), decision, positive=conditioning(FLUX, 1, control=control))
    assert [record.reused for record in found] == [False, True, False, True, False, True]


@pytest.mark.parametrize("decision", ["first_block", "prediction"])
def test_a_patch_between_the_blocks_is_computed_where_its_range_begins_and_ends(decision):
    class Between:
        """As the host's own for Wan's Uni3C."""

        sigma_start, sigma_end = 0.75, 0.4

        def __call__(self, args):
            if self.sigma_end <= float(args["transformer_options"]["sigmas"][0]) <= self.sigma_start:
                args["img"] += 0.5
            return args

    model = build(FLUX)
    model.set_model_patch(Between(), "double_block")
    found = records(model, decision)
    inside = [Between.sigma_end <= record.sigma <= Between.sigma_start for record in found]
    changes = [step for step in range(1, 6) if inside[step] != inside[step - 1]]
    assert len(changes) == 2 and [step for step in range(6) if not found[step].reused] == [0, *changes]


def test_patches_within_the_blocks_are_measured():
    """An IP-Adapter may start at any step, in any block."""
    model = build(FLUX)
    model.set_model_attn1_patch(lambda q, k, v, **_: {"q": q, "k": k, "v": v})
    assert all(record.diff is not None for record in records(model)[1:])


def test_scheduled_loras_are_measured():
    import comfy.hooks

    generator, name = torch.Generator().manual_seed(5), "diffusion_model.double_blocks.0.img_attn.qkv"
    model = build(FLUX)
    rows, columns = model.model.state_dict()[f"{name}.weight"].shape
    weights = {
        f"{name}.lora_up.weight": torch.randn(rows, 4, generator=generator),
        f"{name}.lora_down.weight": torch.randn(4, columns, generator=generator),
    }
    hooks = comfy.hooks.create_hook_lora(weights, strength_model=1.0, strength_clip=0.0)
    frames = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        frames.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(frames)
    scheduled = comfy.hooks.set_hooks_for_conditioning(conditioning(FLUX, 1), hooks)
    assert all(record.diff is not None for record in records(model, positive=scheduled)[1:])
