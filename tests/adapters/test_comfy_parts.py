"""What the host computes with a diffusion model's weights outside its forward, where that runs elsewhere."""

import copy
from types import SimpleNamespace

import pytest
import torch
from adapters.parts_cases import on, run
from tiny_models import TINY_MODELS, build, conditioning, relative

pytestmark = pytest.mark.usefixtures("comfy")
FLUX, QWEN, SD3, ANIMA = (TINY_MODELS[name] for name in ("flux", "qwen_image", "sd3", "anima"))


def inside(model, tiny, look, *, call=0):
    """Sample, and call look(the model as the host sees it) in front of this model call."""
    from comfy.patcher_extension import WrappersMP

    found, numbers = [], iter(range(1000))

    def looks(executor, *args, **kwargs):
        if next(numbers) == call:
            found.append(look(executor.class_obj))
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "looks", looks)
    run(clone, tiny, steps=2, cfg=1.0)
    return found[0]


@pytest.mark.parametrize(
    ("call", "leaves"),
    [(0, False), (1, False), (1, True)],
    ids=["before the first call", "between calls", "off the device"],
)
@pytest.mark.parametrize("scheme", [None, "fp8_dynamic_per_tensor"])
def test_parts_compute_with_the_loaded_weights_at_any_time(elsewhere, scheme, call, leaves):
    from para_core.adapters.comfy_quantization import apply_quantization

    model = on("img_in", on("double_blocks.1.img_attn.qkv", build(FLUX)))
    model = model if scheme is None else apply_quantization(model, scheme)[0]
    x = torch.randn(1, 3, FLUX.unet_config["hidden_size"], generator=torch.Generator().manual_seed(0))

    def results(base):
        if leaves and elsewhere.group.calls:
            elsewhere.group.service.unload({})
        blocks, img_in = base.diffusion_model.double_blocks, base.diffusion_model.img_in
        tables = [block.img_attn.qkv(x) for block in blocks]
        assert len(blocks) == len(tables) and torch.equal(blocks[-1].img_attn.qkv(x), tables[-1])
        state = img_in.state_dict()
        return [*tables, img_in(x[..., : img_in.in_features]), state["bias"].clone(), state["weight"].clone()]

    here, there = (inside(one, FLUX, results, call=call) for one in (model, elsewhere(model)))
    assert len(here) == len(there) and all(map(torch.equal, here, there))
    assert not torch.equal(here[-1], build(FLUX).model.diffusion_model.img_in.weight)


def test_what_needs_no_weights_stays_here(elsewhere):
    model = build(TINY_MODELS["ltxv"])
    original, table = model.model.diffusion_model, torch.ones(2)
    original.patchify_proj.register_buffer("table", table)

    def results(base):
        ltxv, asked = base.diffusion_model, len(elsewhere.group.calls)
        x = torch.randn(1, 128, 2, 3, 4)
        assert ltxv.patchifier is original.patchifier and ltxv.patchifier.patchify(x)[0].shape == (1, 24, 128)
        assert ltxv.patchify_proj.weight.shape == original.patchify_proj.weight.shape
        assert ltxv.patchify_proj.weight.is_meta and ltxv.patchify_proj.in_features == 128
        assert next(ltxv.patchify_proj.parameters()).dtype is torch.float32
        named = dict(ltxv.patchify_proj.named_parameters())
        assert named["weight"].is_meta and named["weight"].shape == original.patchify_proj.weight.shape
        assert ltxv.patchify_proj.table is table and dict(ltxv.patchify_proj.named_buffers())["table"] is table
        assert not hasattr(ltxv, "preprocess_text_embeds") and not hasattr(ltxv.patchify_proj, "another")
        return len(elsewhere.group.calls) - asked

    assert inside(elsewhere(model), TINY_MODELS["ltxv"], results) == 0


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda flux: flux.img_in.to("cpu"), "img_in.to of the model is used while it samples"),
        (lambda flux: flux.img_in(torch.device("cpu")), "argument 0 of img_in.call is a device"),
        (lambda flux: flux.process_img(lambda: 1), "argument 0 of process_img is a function"),
    ],
    ids=["moves", "part", "method"],
)
def test_what_cannot_be_asked_of_the_ranks_is_refused_by_name(elsewhere, use, message):
    with pytest.raises(ValueError, match=message):
        inside(elsewhere(build(FLUX)), FLUX, lambda base: use(base.diffusion_model))


def test_a_lora_that_widens_a_layer_brings_its_picture(elsewhere):
    """As FLUX's control LoRAs do: the host reads from the weight whether to join a picture to the latent."""
    model = build(FLUX)
    weight = model.model.diffusion_model.img_in.weight
    wide = torch.randn(weight.shape[0], 2 * weight.shape[1], generator=torch.Generator().manual_seed(5)) / 8
    controlled = model.clone()
    key = "diffusion_model.img_in.weight"
    assert controlled.add_patches({key: ("diff", (wide, {"pad_weight": True}))}) == [key]
    picture = torch.randn(1, *FLUX.latent, generator=torch.Generator().manual_seed(6))
    text = {"positive": conditioning(FLUX, 1, concat_latent_image=picture), "cfg": 1.0}
    expected = run(controlled, FLUX, **text)
    assert relative(expected, run(controlled, FLUX, cfg=1.0)) > 1e-3
    assert torch.equal(run(elsewhere(controlled), FLUX, **text), expected)


def test_a_controlnet_that_calls_embedders_of_the_model(elsewhere, on_two_ranks):
    """As Qwen-Image's Fun ControlNet does."""
    import comfy.ops
    from comfy import controlnet

    if not hasattr(controlnet, "QwenFunControlNet"):
        pytest.skip("this ComfyUI has no Qwen Fun ControlNet; 0.33 has")
    from comfy.ldm.qwen_image.controlnet import QwenImageFunControlNetModel
    from tiny_models.tiny_model import fill

    fun = QwenImageFunControlNetModel(
        132, 64, 2, 32, num_control_blocks=2, main_model_double=4, injection_layers=(0, 2),
        dtype=torch.float32, operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    fill(fun, (), torch.Generator().manual_seed(3))
    control = controlnet.QwenFunControlNet(
        fun, latent_format=None, load_device=torch.device("cpu"), compression_ratio=1, extra_conds=[]
    ).set_cond_hint(torch.randn(1, 3, 10, 14, generator=torch.Generator().manual_seed(4)), 1.0, (0.0, 1.0))
    model = on("img_in", build(QWEN))
    text = {"positive": conditioning(QWEN, 1, control=control), "cfg": 1.0, "steps": 2}
    expected = run(model, QWEN, **text)
    assert relative(expected, run(model, QWEN, cfg=1.0, steps=2)) > 1e-3
    assert torch.equal(run(elsewhere(model), QWEN, **text), expected)
    assert relative(run(on_two_ranks(model), QWEN, **text), expected) <= 1e-6


def test_a_controlnet_that_copies_an_embedder_of_the_model(elsewhere):
    """As those of Stable Diffusion 3.5 do before the first step."""
    from comfy import controlnet

    model = on("y_embedder.mlp.0", build(SD3))

    def copied(base):
        own = copy.deepcopy(build(SD3).model.diffusion_model.y_embedder)
        control = controlnet.ControlNetSD35(None)
        control.control_model = SimpleNamespace(double_y_emb=True, orig_y_embedder=own)
        control.pre_run(base, float)
        return own.state_dict()

    here, there = (inside(one, SD3, copied) for one in (model, elsewhere(model)))
    assert here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)
    assert not torch.equal(there["mlp.0.weight"], model.model.diffusion_model.y_embedder.mlp[0].weight)
