"""Guiders that sample with a second model: the launcher's part of it is refused, and never left out silently."""

import pytest
import torch
from tiny_models import TINY_MODELS, build, conditioning, host_version, sample

pytestmark = pytest.mark.usefixtures("comfy")
FLUX = TINY_MODELS["flux"]


def sampled_with(model, second):
    """By the host's guider that has one model for the positive prompt, and another for the negative one."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_DualModel

    guider = Guider_DualModel(model, second)
    guider.set_conds(conditioning(FLUX, 1, 7), conditioning(FLUX, 2, 5))
    guider.set_cfg(3.0)
    noise = torch.randn(1, *FLUX.latent, generator=torch.Generator().manual_seed(0))
    sampler = comfy.samplers.sampler_object("euler")
    return guider.sample(noise, torch.zeros_like(noise), sampler, torch.tensor([1.0, 0.5, 0.0]), disable_pbar=True)


@pytest.fixture
def dual(elsewhere):
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 has no such guider")
    return elsewhere


def test_a_second_model_on_the_ranks_is_refused_before_they_are_asked_for_anything(dual):
    message = r"Guider_DualModel samples with a second model \(uncond_model_patcher\).*to the first one only"
    with pytest.raises(ValueError, match=message):
        sampled_with(dual(build(FLUX)), dual(build(FLUX, seed=1)))
    assert dual.group.calls == []


def test_a_launcher_on_the_second_model_alone_is_refused(dual):
    with pytest.raises(ValueError, match="a node samples with this model itself.*Connect the launcher to the first"):
        sampled_with(build(FLUX), dual(build(FLUX, seed=1)))
    assert dual.group.calls == []


def test_the_first_model_runs_on_the_ranks(dual):
    first, second = build(FLUX), build(FLUX, seed=1)
    expected = sampled_with(first, second)
    assert torch.equal(sampled_with(dual(first), second), expected)
    assert dual.group.calls.count("forward") == 2


def test_a_model_behind_two_launchers_samples_as_behind_the_latter(elsewhere):
    model = build(FLUX)
    twice = elsewhere(elsewhere(model))
    assert torch.equal(sample(twice, FLUX), sample(model, FLUX))
    assert len(twice.get_all_callbacks("on_pre_run")) == 1 and model.get_all_callbacks("on_pre_run") == []
