"""Which scheme a device can run, what it is told where it cannot, and packages that are missing."""

import sys

import pytest
import torch

from para_core.quantization import (
    QuantizedWeight,
    quantize,
)
from para_core.quantization_scheme import SCHEMES, has_kernels, scheme_for

CPU = torch.device("cpu")


def test_unknown_scheme_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match='^scheme "fp7" is not available here; choose one of: auto, fp8_dynamic'):
        scheme_for("fp7", CPU)
    with pytest.raises(ValueError, match="choose one of: auto, fp8_weight_only, int8_weight_only, nf4$"):
        scheme_for("fp8_dynamic_per_row", CPU, weight_only=True)


@pytest.mark.parametrize(
    ("capability", "automatic", "instead"),
    [((8, 6), "int8_dynamic_per_row", "int8_dynamic_per_row"), ((7, 0), "int8_weight_only", "int8_weight_only")],
)
def test_an_older_gpu_is_named_with_what_it_lacks(monkeypatch, capability, automatic, instead):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    device = torch.device("cuda:0")
    version = ".".join(map(str, capability))
    with pytest.raises(
        ValueError,
        match=rf"^fp8_dynamic_per_row cannot run on Some GPU \(cuda:0\): its compute capability is {version}, "
        f"below 8.9. Choose {instead} or auto instead, which also work with Compile Model.$",
    ):
        scheme_for("fp8_dynamic_per_row", device)
    assert scheme_for("auto", device).name == automatic
    assert scheme_for("fp8_weight_only", device).name == "fp8_weight_only"


def test_a_device_without_fp8_is_named():
    with pytest.raises(ValueError, match="^fp8_dynamic_per_tensor cannot run on mps: mps has no float8"):
        scheme_for("fp8_dynamic_per_tensor", torch.device("mps"))


def test_auto_takes_dynamic_fp8_where_it_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert scheme_for("auto", torch.device("cuda:0")).name == "fp8_dynamic_per_row"
    assert scheme_for("auto", torch.device("cuda:0"), weight_only=True).name == "int8_weight_only"
    assert scheme_for("auto", CPU).name == "int8_weight_only"


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.raises(ValueError, match="needs torchao, which is missing; install it with: pip install torchao"):
        scheme_for("fp8_dynamic_per_row", torch.device("cuda:0"))
    with pytest.raises(ValueError, match="needs bitsandbytes, which is missing; install it with: pip install bits"):
        scheme_for("nf4", CPU)
    # The reference and the weight-only schemes need neither.
    for name in SCHEMES.keys() - {"nf4"}:
        assert isinstance(quantize(torch.randn(96, 256), scheme_for(name, CPU)), QuantizedWeight)
    assert has_kernels(SCHEMES["fp8_dynamic_per_row"], torch.device("cuda:0"))
