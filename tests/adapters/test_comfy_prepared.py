"""What the ranks have been asked to build, also where that was cancelled or failed half-way."""

import pytest
import torch
from tiny_models import FLUX, build, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")


def cancelled_once_asked(group, method):
    """The next call of the method is cancelled while the ranks work on it, which they do to its end."""
    from comfy.model_management import InterruptProcessingException

    original = group.call

    def call(asked, payload, **settings):
        answer = original(asked, payload, **settings)
        if asked == method:
            group.call = original
            raise InterruptProcessingException
        return answer

    group.call = call
    return pytest.raises(InterruptProcessingException)


def failing_on_the_rank(group, method):
    """The next call of the method raises there, after what it replaces is gone."""
    from para_core.adapters import comfy_rank_models
    from para_core.workers import WorkerError

    builder = {"patch": "with_patches", "load_vae": "from_module"}[method]
    original, make = group.call, getattr(comfy_rank_models, builder)

    def fails(*args):
        raise ModuleNotFoundError("no such adapter")

    def call(asked, payload, **settings):
        if asked != method:
            return original(asked, payload, **settings)
        setattr(comfy_rank_models, builder, fails)
        try:
            return original(asked, payload, **settings)
        except ModuleNotFoundError as error:
            raise WorkerError(str(error)) from error
        finally:
            setattr(comfy_rank_models, builder, make)
            group.call = original

    group.call = call
    return pytest.raises(WorkerError)


ENDS = pytest.mark.parametrize("ends", [cancelled_once_asked, failing_on_the_rank])


@ENDS
@pytest.mark.parametrize("before", [None, 0.5], ids=["plain", "lora"])
def test_a_variant_that_was_left_half_way(elsewhere, before, ends):
    """The ranks have dropped the one before by then; both it and the other can be asked for again."""
    model = build(FLUX)
    first = elsewhere(model if before is None else lora(model, before))
    other = elsewhere(lora(model, 1.0))
    expected = sample(first, FLUX)
    with ends(elsewhere.group, "patch"):
        sample(other, FLUX)
    assert torch.equal(sample(first, FLUX), expected)
    assert torch.equal(sample(other, FLUX), sample(lora(model, 1.0), FLUX))
    assert elsewhere.group.calls.count("load") == 1


@ENDS
def test_a_vae_that_was_left_half_way(elsewhere, ends):
    """What the ranks have of a VAE is not what was asked for before."""
    from comfy.model_patcher import ModelPatcher

    prepared, service, cpu = elsewhere.group.recover.__self__.prepared, elsewhere.group.service, torch.device("cpu")
    first, other = (ModelPatcher(torch.nn.Linear(2, 2), load_device=cpu, offload_device=cpu) for _ in range(2))
    prepared.vae(first)
    with ends(elsewhere.group, "load_vae"):
        prepared.vae(other)
    for vae in (first, other):
        names = prepared.vae(vae)
        name, patcher = service._vae
        assert names == {"model": name}
        assert torch.equal(patcher.model.diffusion_model.weight, vae.model.weight)
