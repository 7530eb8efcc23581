"""State belongs to one sampling run and one model, also where the host gives the same conditioning ids again."""

import pytest
import torch
from tiny_models import FLUX, build, conditioning, relative

pytestmark = pytest.mark.usefixtures("comfy")


def fbcache(patcher, residual_diff_threshold, listener=None):
    from para_core.adapters.comfy_fbcache import apply_fbcache
    from para_core.residual_cache import CacheConfig

    return apply_fbcache(patcher, CacheConfig(residual_diff_threshold), listener=listener)


def test_second_run_of_one_guider_starts_anew():
    """SamplerCustomAdvanced keeps its guider while only the sampler is run again: the ids are those of run one."""
    import comfy.samplers
    from comfy_extras.nodes_custom_sampler import Guider_Basic

    guider = Guider_Basic(fbcache(build(FLUX), 100.0))
    guider.set_conds(conditioning(FLUX, 1))

    def run(seed):
        noise = torch.randn(1, *FLUX.latent, generator=torch.Generator().manual_seed(seed))
        sampler = comfy.samplers.sampler_object("euler")
        return guider.sample(noise, torch.zeros_like(noise), sampler, torch.linspace(1, 0, 5), seed=seed)

    first = run(0)
    run(1)
    assert torch.equal(run(0), first)


def test_two_models_with_the_same_conditioning_have_their_own_residuals():
    """As in a guider that runs one prompt through two models."""
    import comfy.samplers

    class TwoModels(comfy.samplers.CFGGuider):
        def predict_noise(self, x, timestep, model_options=None, seed=None):
            outputs.extend(
                comfy.samplers.calc_cond_batch(model, [self.conds["positive"]], x, timestep, model_options)[0]
                for model in (self.inner_model, other.model)
            )
            return outputs[-1]

    outputs, reports = [], []
    other = build(FLUX, seed=9)
    guider = TwoModels(fbcache(build(FLUX), 0.01, reports.append))
    other.pre_run()
    guider.inner_set_conds({"positive": conditioning(FLUX, 1)})
    noise = torch.randn(1, *FLUX.latent, generator=torch.Generator().manual_seed(0))

    def twice(model, x, sigmas, extra_args, callback, disable, **_):
        for _ in range(2):
            model(x, sigmas[:1], **extra_args)
        return x

    guider.sample(noise, torch.zeros_like(noise), comfy.samplers.KSAMPLER(twice), torch.linspace(1, 0, 5), seed=0)
    one, two, one_again, two_again = outputs
    assert relative(one, two) > 0.05
    assert relative(one_again, one) <= 1e-5
    assert relative(two_again, two) <= 1e-5
    assert reports[-1].num_reused_calls == 2
