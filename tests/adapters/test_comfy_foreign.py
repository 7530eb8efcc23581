"""Models and LoRAs that are made of another custom node's classes: they are named, and nothing of them is packed."""

import pickle
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import FLUX, build, host_version, sample
from tiny_models.lora import lora

pytestmark = pytest.mark.usefixtures("comfy")
SOURCE = """
import comfy.ops, comfy.weight_adapter, torch

class Ops(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        pass

class Tensor(torch.Tensor):
    pass

class Adapter(comfy.weight_adapter.LoRAAdapter):
    pass
"""


@pytest.fixture
def node(comfy, tmp_path, monkeypatch):
    """A module of a custom node, whose package has the name that the host gives it: its path, without dots."""
    folder = tmp_path / "custom_nodes" / "ComfyUI-GGUF"
    package = types.ModuleType(str(folder).replace(".", "_x_"))
    module = types.ModuleType(f"{package.__name__}.ops")
    module.__file__ = str(folder / "ops.py")
    for one in (package, module):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    exec(compile(SOURCE, module.__file__, "exec"), vars(module))  # noqa: S102
    return module


def with_its_linears(model, node):
    for module in model.model.diffusion_model.modules():
        if type(module).__name__ == "Linear":
            module.__class__ = node.Ops.Linear
    return model


def with_its_tensors(model, node):
    layer = model.model.diffusion_model.double_blocks[0].img_attn.qkv
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(node.Tensor), requires_grad=False)
    return model


def with_its_lora(model, node):
    patched = lora(model, 0.5)
    for found in patched.patches.values():
        for index, (strength, weights, *rest) in enumerate(found):
            found[index] = (strength, node.Adapter(set(), weights), *rest)
    return patched


@pytest.mark.parametrize(
    ("change", "named", "remedy"),
    [
        (with_its_linears, "uses Ops.Linear of the custom node ComfyUI-GGUF", "Load it with ComfyUI's own loader"),
        (with_its_tensors, "tensors of the class Tensor of the custom node ComfyUI-GGUF", "ComfyUI's own loader"),
        (with_its_lora, "a LoRA .* uses Adapter of the custom node ComfyUI-GGUF", "Remove it"),
    ],
)
def test_what_another_pack_made_is_refused_by_its_name(elsewhere, node, change, named, remedy):
    model = build(FLUX)
    with pytest.raises(ValueError, match=f"{named}.*{remedy}"):
        sample(elsewhere(change(model, node)), FLUX)
    assert not {"patch", "begin"} & set(elsewhere.group.calls)
    if change is not with_its_lora:
        assert "load" not in elsewhere.group.calls


def test_tensors_of_another_class_are_not_written_out(node):
    """They are met before their data is, which may be most of the memory there is."""
    from para_core.adapters.comfy_travel import TensorsAside

    class File:
        written = 0

        def write(self, data):
            self.written += len(data)

    file, weight = File(), torch.zeros(1 << 20).as_subclass(node.Tensor)
    with pytest.raises(pickle.PicklingError):
        TensorsAside(file).dump({"weight": weight})
    assert file.written < 1000


def test_a_recipe_with_another_packs_operations_is_none(comfy, node, tmp_path):
    from para_core.adapters.comfy_travel import recipe_of

    def model(**options):
        import comfy.sd

        made = build(FLUX)
        made.cached_patcher_init = comfy.sd.load_diffusion_model, ("flux.safetensors", options)
        return made

    assert recipe_of(model(dtype=torch.bfloat16)) is not None
    assert recipe_of(model(custom_operations=node.Ops)) is None


def fp8_file(file: Path) -> Path:
    """A checkpoint that holds fp8 weights with scales, as the host's own format has them."""
    from para_core.adapters.comfy_quantization import apply_quantization

    quantized, _ = apply_quantization(build(FLUX), "fp8_dynamic_per_tensor")
    quantized.patch_model(load_weights=False)
    state = {name: tensor.contiguous() for name, tensor in quantized.model.diffusion_model.state_dict().items()}
    quantized.unpatch_model(unpatch_weights=False)
    save_file(state, file)
    return file


def test_the_hosts_own_quantized_weights_go_to_the_ranks(elsewhere, tmp_path):
    """By the recipe of its loader, in the pages of their file; the module itself cannot be sent."""
    if host_version() < (0, 33):
        pytest.skip("ComfyUI 0.3 has no quantized tensors")
    import comfy.sd

    from para_core.adapters.comfy_quantized_tensor import is_quantized
    from para_core.adapters.comfy_shared_weights import private_bytes

    model = comfy.sd.load_diffusion_model(str(fp8_file(tmp_path / "flux_fp8.safetensors")))
    assert any(is_quantized(weight) for weight in model.model.diffusion_model.parameters())
    assert torch.equal(sample(elsewhere(model), FLUX, steps=2), sample(model, FLUX, steps=2))
    (there,) = elsewhere.group.service._models.values()
    weights = [weight for weight in there.model.diffusion_model.parameters() if is_quantized(weight)]
    data = [weight.data_ptr() for weight in weights]
    assert data and private_bytes(there) == 0

    there.load(torch.device("meta"), lowvram_model_memory=1e32)
    there.unpatch_model(torch.device("cpu"))
    weights = [weight for weight in there.model.diffusion_model.parameters() if is_quantized(weight)]
    assert [weight.data_ptr() for weight in weights] == data

    model.cached_patcher_init = None
    with pytest.raises(ValueError, match="cannot go to other processes.*Load it with ComfyUI's own loader"):
        sample(elsewhere(model), FLUX, steps=1)


def test_our_own_classes_go_by_names_that_every_process_knows(comfy, monkeypatch):
    """In the host our package lies below the name of its folder."""
    from para_core.adapters import comfy_foreign
    from para_core.adapters.comfy_travel import pack, unpack
    from para_core.quantization_scheme import SCHEMES

    packed, tensors = pack(SCHEMES["int8_weight_only"])
    assert b"para_core" not in packed
    assert unpack(packed, tensors) == SCHEMES["int8_weight_only"]
    monkeypatch.setattr(comfy_foreign, "OURS", "custom_nodes.other.para_core.")
    with pytest.raises(pickle.PicklingError, match="Scheme of para_core.quantization_scheme, which they do not have"):
        pack(SCHEMES["int8_weight_only"])
