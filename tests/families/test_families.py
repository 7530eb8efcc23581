"""What a model family says about itself, and how the one of a model is found; no host involved."""

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import families_table
import pytest
from tiny_models import TINY_MODELS, host_version
from torch import nn

from para_core.families import FAMILIES, REASONS, BlockStack, ModelFamily, Stream, family_of
from para_core.families.flux import FLUX
from para_core.families.refused import REFUSED

ROOT = Path(__file__).absolute().parents[2]
EACH = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: f"{family.name} {family.marker}".strip())


def model_class(name, *bases, module="comfy.ldm.some.model"):
    return type(name, bases or (nn.Module,), {"__module__": module})


@EACH
def test_a_family_is_complete(family):
    assert family.name and family.models and family.classes and family.stacks
    assert 0 < family.residual_diff_threshold < 0.5
    for stack in family.stacks:
        held = [name for stream in stack.streams for name in stream.holds]
        assert len(held) == len(set(held)), "a token stream is in two places"
        assert set(family.cached) <= set(held)
        for name in family.cached:
            # Otherwise its place would depend on more than the number of its own tokens.
            assert name in (stack.stream_with(name).holds[0], stack.stream_with(name).holds[-1])


def test_every_tiny_model_has_a_family_and_every_family_of_comfyui_a_tiny_model():
    tested = {tiny.family for tiny in TINY_MODELS.values()}
    named = {family.name for family in FAMILIES}
    assert tested <= named
    assert {name for name in named - tested if "diffusers" not in name} == set()


def test_a_subclass_belongs_to_the_nearest_named_class():
    video = model_class("LTXVModel", module="comfy.ldm.lightricks.model")
    assert family_of(model_class("LTXAVModel", video)()).name == "ltxav"
    assert family_of(model_class("SomethingElse", video)()).name == "ltxv"


def test_classes_of_one_name_are_told_apart_by_their_module():
    assert family_of(model_class("MMDiT", module="comfy.ldm.aura.mmdit")()).name == "aura_flow"
    sd3 = model_class("MMDiT", module="comfy.ldm.modules.diffusionmodules.mmdit")
    assert family_of(model_class("OpenAISignatureMMDITWrapper", sd3)()).name == "sd3"
    with pytest.raises(ValueError, match="^MMDiT is not a model"):
        family_of(sd3())


def test_a_diffusers_model_is_not_taken_for_the_comfyui_model_of_the_same_name():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")
    names = {name.split(".")[-1] for family in FAMILIES if "diffusers" not in family.name for name in family.classes}
    found = [getattr(diffusers, name) for name in sorted(names) if hasattr(diffusers, name)]
    assert found, "the two have no name in common, so this test shows nothing"
    for cls in found:
        with pytest.raises(ValueError, match=f"^{cls.__name__} is not a model"):
            family_of(object.__new__(cls))


def test_layouts_of_one_class_are_told_apart_by_a_marker():
    model = model_class("HunyuanVideo")()
    assert family_of(model).stacks[1].streams[0].holds == ("txt", "img")
    block = nn.Module()
    block.img_attn = nn.Module()
    block.img_attn.norm = nn.Module()
    block.img_attn.norm.query_norm = nn.Module()
    block.img_attn.norm.query_norm.scale = nn.Parameter()
    model.double_blocks = nn.ModuleList([block])
    assert family_of(model).stacks[1].streams[0].holds == ("img", "txt")


def test_an_unknown_class_is_refused_by_name_with_what_is_supported():
    with pytest.raises(ValueError) as error:
        family_of(nn.Linear(2, 2))
    first = str(error.value).splitlines()[0]
    assert first.startswith("Linear is not a model that Para Accelerate knows; supported are: ")
    assert all(family.models in first for family in FAMILIES)


@pytest.mark.parametrize(("name", "reason"), REASONS.items())
def test_a_class_that_cannot_be_served_is_refused_with_the_reason(name, reason):
    family = next((family for family in FAMILIES if name in family.refuses), None)
    served = model_class(family.classes[0]) if family else nn.Module
    for refused in (model_class(name, served), model_class("Derived", model_class(name, served))):
        with pytest.raises(ValueError, match=f"^{refused.__name__} cannot be accelerated: {reason}. Remove the node"):
            family_of(refused())


@pytest.mark.parametrize("name", REFUSED)
def test_the_refused_class_is_comfyuis(comfy, name):
    """A name that no host has would refuse nothing."""
    importlib.import_module("comfy.model_base")  # which imports every model
    modules = [module for path, module in sys.modules.items() if path.startswith("comfy.ldm.")]
    found = [module for module in modules if hasattr(module, name)]
    if not found and host_version() < (0, 33):
        pytest.skip(f"this ComfyUI has no {name}")
    with pytest.raises(ValueError, match=f"^{name} cannot be accelerated: "):
        family_of(object.__new__(getattr(found[0], name)))


def test_blocks_are_found_in_lists_dicts_and_layers():
    model = nn.Module()
    blocks = [nn.Linear(1, 1) for _ in range(4)]
    model.listed = nn.ModuleList(blocks)
    model.named = nn.ModuleDict({f"block{index}": block for index, block in enumerate(blocks)})
    model.layered = nn.ModuleList([nn.Sequential(blocks[0]), nn.Sequential(*blocks[1:])])
    model.absent = None
    streams = (Stream(0, None, ("img",)),)
    assert BlockStack("listed", streams).blocks_in(model) == blocks
    assert BlockStack("named", streams).blocks_in(model) == blocks
    assert BlockStack("layered", streams, layered=True, start=1).blocks_in(model) == blocks[1:]
    assert BlockStack("absent", streams).blocks_in(model) == []


def test_the_table_has_every_family():
    rows = families_table.table().splitlines()
    assert len({len(row.split(" | ")) for row in rows if row.startswith("|")}) == 1
    assert all(any(row.startswith(f"| {family.models} |") for row in rows) for family in FAMILIES if served(family))
    assert "- `CausalWanModel`: its blocks fill a key/value cache" in families_table.table()
    assert "- `WanModel_S2V`: it adds audio to whole frames" in families_table.table()


@EACH
def test_sharding_speaks_of_the_streams_of_its_stacks(family):
    """What the data names exists: tokens that are split, argument names that ranks can look up."""
    known = [name for stack in family.stacks for stream in stack.streams for name in stream.holds]
    for stack in (*family.stacks, *family.branches):
        if stack.sharding is None:
            continue
        for over in stack.sharding.attentions:
            assert set(over if not over or isinstance(over[0], str) else sum(over, ())) <= set(known)
        for per_token in stack.sharding.per_token:
            assert set(per_token.holds) <= set(known) and set(per_token.counted) <= set(per_token.holds)
        assert all(set(stream.holds) <= set(known) for stream in stack.sharding.streams)
    shards = [stack.sharding is not None for stack in (*family.stacks, *family.branches)]
    refused = any(name in family.classes for name in family.unsharded)
    assert all(shards) or refused or "diffusers" in family.name


def served(family: ModelFamily) -> bool:
    return any(tiny.family == family.name for tiny in TINY_MODELS.values())


def test_the_readme_shows_the_table():
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    start, end = "<!-- families -->", "<!-- /families -->"
    if start not in text:
        pytest.skip("README.md has no <!-- families --> yet")
    shown = text.split(start)[1].split(end)[0].strip()
    assert shown == families_table.table(), "paste what python -m tests.families_table prints"


def test_threshold_grows_with_rounded_activations_as_published_for_flux():
    """0.12 in dynamic float8 where 0.08 is usual without; schemes that leave activations alone change nothing."""
    usual = replace(FLUX, residual_diff_threshold=0.08)
    assert usual.threshold_for(0) == 0.08
    assert usual.threshold_for(1) == pytest.approx(0.12, abs=0.001)
    assert 0.08 < usual.threshold_for(0.3) < 0.085
