"""Which layers are chosen, and which are left and why; patterns that do nothing are refused."""

import pytest
import torch
from torch import nn

from para_core.families import BlockStack, ModelFamily
from para_core.quantization_plan import Selection, choose_layers, family_layers, listed_layers, weight_obstacle

FAMILY = ModelFamily("toy", ("Toy",), (BlockStack("blocks", ()),))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(64, 192)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(64, 128))
        self.norm = nn.LayerNorm(64)
        self.gate = nn.Linear(64, 1)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Linear(64, 64)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.final_layer = nn.Linear(64, 64)


def choose(include="", exclude="", model=None):
    model = model or Toy()
    return choose_layers(
        model,
        family_layers(model, FAMILY),
        Selection.of(include, exclude),
        lambda name, layer: weight_obstacle(layer.weight),
    )


def test_defaults_are_the_large_layers_in_the_blocks():
    chosen, left = choose()
    assert chosen == ["blocks.0.qkv", "blocks.1.qkv"]
    assert left == {
        "x_embedder": "outside the blocks",
        "blocks.0.adaLN_modulation.1": "modulation, norms, embedders",
        "blocks.0.gate": "smaller than 64 or no multiple of 16",
        "blocks.1.adaLN_modulation.1": "modulation, norms, embedders",
        "blocks.1.gate": "smaller than 64 or no multiple of 16",
        "final_layer": "outside the blocks",
    }


def test_patterns_add_and_remove_layers():
    chosen, _ = choose(include="final_layer, *modulation*")
    assert set(chosen) == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "adaLN_modulation.1")} | {
        "final_layer"
    }
    chosen, left = choose(include="*modulation*", exclude="blocks.0.*")
    assert chosen == ["blocks.1.qkv", "blocks.1.adaLN_modulation.1"]
    assert left["blocks.0.qkv"] == "excluded"


@pytest.mark.parametrize("where", ["include", "exclude"])
def test_a_pattern_without_effect_is_refused(where):
    with pytest.raises(ValueError, match='^pattern "qkv" matches no linear layer; the layers are called like: x_embed'):
        choose(**{where: "qkv"})


def test_nothing_to_quantize_is_refused():
    with pytest.raises(ValueError, match="^no layer to quantize: 8 excluded. Remove the node.$"):
        choose(exclude="*")


def test_a_model_without_family_is_quantized_in_its_lists():
    assert set(listed_layers(Toy())) == {
        f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "adaLN_modulation.1", "gate")
    }


def test_what_is_quantized_already_is_named():
    assert weight_obstacle(torch.zeros(64, 64).to(torch.float8_e4m3fn)) == "already quantized (float8_e4m3fn)"
    assert weight_obstacle(torch.zeros(64, 64, dtype=torch.int8)) == "already quantized (int8)"

    class GGMLTensor(torch.Tensor):
        pass

    assert weight_obstacle(torch.zeros(64, 64).as_subclass(GGMLTensor)) == "already quantized (GGMLTensor)"
    assert weight_obstacle(None) == weight_obstacle(torch.zeros(64, 64, device="meta")) == "without weights"
    assert weight_obstacle(nn.Parameter(torch.zeros(64, 64, dtype=torch.float16))) is None
