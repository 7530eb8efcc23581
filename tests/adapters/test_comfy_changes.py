"""What changes in the middle of a run beside the time: the cache sees it, also where block 0 would not have run."""

import pytest
import torch
from tiny_models import FLUX, all_foreseen, build, conditioning, fbcache, flux_control, sample

pytestmark = pytest.mark.usefixtures("comfy")

ALWAYS = 100.0


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
