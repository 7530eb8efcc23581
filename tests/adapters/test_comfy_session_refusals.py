"""What a MODEL that samples elsewhere refuses, or tells of, before its ranks are asked for anything."""

from types import SimpleNamespace

import pytest
import torch
from fixtures_in_process import InProcess
from tiny_models import TINY_MODELS, build, sample

pytestmark = pytest.mark.usefixtures("comfy")

FLUX = TINY_MODELS["flux"]


def compiled_by_the_host(model):
    from comfy_api.torch_helpers.torch_compile import set_torch_compile_wrapper

    set_torch_compile_wrapper(model, "eager")


def exchanged(model):
    model.add_object_patch("diffusion_model", model.model.diffusion_model)


def patched(model):
    model.set_model_patch_replace(lambda args, extra: extra["original_block"](args), "dit", "double_block", 0)


def wrapped(model):
    model.add_wrapper_with_key(
        "diffusion_model", "someone's", lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )


def skips_layers(model):
    """As SkipLayerGuidanceDiT does."""
    import comfy.model_patcher

    def post_cfg(args):
        comfy.model_patcher.set_model_options_patch_replace(args["model_options"], None, "dit", "double_block", 0)

    model.set_model_sampler_post_cfg_function(post_cfg)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (compiled_by_the_host, "use Compile Model"),
        (exchanged, r"exchanges parts of the model \(diffusion_model\)"),
        (patched, r"a node patches the inside of the model \(patches_replace: dit\)"),
        (wrapped, r"a node wraps the diffusion model \(someone's\)"),
        (skips_layers, "another node's guidance calls it with patched blocks"),
    ],
)
def test_what_ranks_cannot_do_is_refused_before_they_are_asked_for_anything(elsewhere, change, message):
    model = elsewhere(build(FLUX))
    change(model)
    with pytest.raises(ValueError, match=message):
        sample(model, FLUX)
    assert elsewhere.group.calls == []


def test_a_wrapper_that_runs_the_model_here_is_told(caplog):
    from comfy.patcher_extension import WrappersMP

    from para_core.adapters.comfy_parallel import apply_parallel, last_parallel_report
    from para_core.adapters.comfy_session import Session
    from para_core.parallel_config import ParallelConfig

    original, said, session = build(FLUX), [], Session(InProcess())
    model = apply_parallel(original, ParallelConfig(("cpu",)), lambda config: session, listener=said.append)

    def runs_it_here(executor, *args, **kwargs):
        base, found = executor.class_obj, executor.class_obj.diffusion_model
        base.diffusion_model = found.original
        try:
            return executor(*args, **kwargs)
        finally:
            base.diffusion_model = found

    assert torch.equal(sample(model, FLUX), sample(original, FLUX)) and len(said) == 1
    assert last_parallel_report(model).asked and "not asked" not in last_parallel_report(model).text()
    model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "someone's", runs_it_here)
    sample(model, FLUX)
    assert [notice.kind for notice in said] == ["ranks", "not_asked"] and "were not asked" in caplog.text
    assert not last_parallel_report(model).asked and last_parallel_report(model).text().endswith(said[-1].text())


def test_a_patch_that_cannot_travel_is_named(elsewhere):
    model = build(FLUX)
    name = next(key for key in model.model.state_dict() if key.endswith("img_in.weight"))
    model.add_patches({name: (lambda weight: weight,)})
    with pytest.raises(ValueError, match="a LoRA or another patch of the weights cannot go to other processes"):
        sample(elsewhere(model), FLUX)


def test_ranks_that_keep_another_command_line_are_told_of(elsewhere, monkeypatch, caplog):
    """Of a group that outlives its server, which may be started otherwise the next time."""
    from comfy.cli_args import args

    from para_core.adapters.comfy_session import Session

    Session(elsewhere.group).prepare(build(FLUX))
    assert "command line" not in caplog.text
    arguments = {**vars(args), "fp32_unet": True}
    monkeypatch.setattr("para_core.adapters.comfy_session.host_arguments", SimpleNamespace(**arguments))
    Session(elsewhere.group).prepare(build(FLUX))
    assert "with another command line (--fp32-unet), and keep it" in caplog.text
