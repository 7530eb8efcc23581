"""What a quantization reports: sums, words for people, and notes about the device."""

import pytest
import torch

from para_core.quantization import quantize
from para_core.quantization_report import QuantizationReport, Tally, note
from para_core.quantization_scheme import SCHEMES

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


def test_report_adds_up_bytes_and_error():
    scheme = SCHEMES["fp8_dynamic_per_tensor"]
    tally = Tally(scheme, {"a": "excluded", "b": "excluded", "c": "outside the blocks"})
    weights = [torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(128, 64, dtype=torch.bfloat16)]
    for index, weight in enumerate(weights):
        tally.add(f"blocks.{index}", weight, quantize(weight, scheme))
    report = tally.report(CPU)
    assert (report.bytes_before, report.bytes_after) == (2 * 64 * 192, 64 * 192 + 8)
    assert report.share_of_bf16 == report.bytes_after / report.bytes_before
    exact = torch.cat([weight.float() for weight in weights])
    rounded = torch.cat([quantize(weight, scheme).dequantize(torch.float32) for weight in weights])
    assert report.weight_error == pytest.approx(float((rounded - exact).norm() / exact.norm()), rel=1e-4)
    assert report.summary() == (
        f"fp8_dynamic_per_tensor: 2 layers, 24 KB -> 12.01 KB (0.50), weight error {report.weight_error:.2%}; "
        "left 3: 2 excluded, 1 outside the blocks; "
        "cpu has no kernels for it: the reference computes the same numbers and is not faster"
    )


def test_text_names_what_was_left_and_why():
    left = {f"blocks.{i}.a": "already quantized (QuantizedTensor)" for i in range(5)} | {"head": "outside the blocks"}
    report = QuantizationReport("int8_weight_only", ("blocks.0.b",), left, 8192, 4096, 4096, 0.0071, "weight only")
    assert report.text().splitlines() == [
        "FP8 Quantize, scheme int8_weight_only",
        "Layers: 1 quantized, 6 left",
        "Left, already quantized (QuantizedTensor): blocks.0.a, blocks.1.a, blocks.2.a and 2 more",
        "Left, outside the blocks: head",
        "Memory of the quantized layers: 8 KB -> 4 KB (0.50)",
        "Weight error: 0.71% (relative L2)",
        "Note: weight only",
    ]


@pytest.mark.parametrize(
    ("capability", "choice"), [((8, 6), "int8_dynamic_per_row or int8_weight_only"), ((7, 0), "int8_weight_only")]
)
def test_float8_on_an_older_gpu_is_noted_as_not_to_be_compiled(monkeypatch, capability, choice):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    version = ".".join(map(str, capability))
    assert note(SCHEMES["fp8_weight_only"], CUDA) == (
        "weight only: less memory, not faster; compiled code cannot convert float8 on compute capability "
        f"{version}; with Compile Model choose {choice}"
    )
    assert note(SCHEMES["int8_weight_only"], CUDA) == "weight only: less memory, not faster"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert note(SCHEMES["fp8_weight_only"], CUDA) == "weight only: less memory, not faster"
    assert note(SCHEMES["fp8_dynamic_per_row"], CUDA) == ""
