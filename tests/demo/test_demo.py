"""The demo's table and picture, on two prompts; the rows from ComfyUI come with the server's tests."""

import json

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

from para_core.demo.__main__ import main  # noqa: E402
from para_core.demo.table import psnr  # noqa: E402

ROW_KEYS = {
    "name", "ranks", "wall_s", "speedup", "steps", "reused_steps", "block_calls", "block_calls_baseline", "rel_l2",
    "psnr_db", "attribute_accuracy", "quantized_memory", "note", "image",
}  # fmt: skip


def run(monkeypatch, tmp_path, *arguments, compile=False):
    arguments = arguments if compile else ("--no-compile", *arguments)
    monkeypatch.setattr("sys.argv", ["demo", "--out", str(tmp_path), "--no-host", "--prompts", "2", *arguments])
    main()
    return json.loads((tmp_path / "demo.json").read_text())


def test_demo_writes_the_table_and_the_pictures(monkeypatch, tmp_path, capsys):
    result = run(monkeypatch, tmp_path, "--thresholds", "0", "1000", "--prediction-thresholds", "0.06", "--schemes")
    assert result["device"] == "cpu" and result["torch"] == torch.__version__ and result["comfyui"] is None
    baseline, never, always, prediction = result["rows"]
    assert all(set(row) == ROW_KEYS for row in result["rows"])
    assert (never["reused_steps"], never["rel_l2"], never["psnr_db"]) == (0, 0, None)
    assert (always["reused_steps"], always["block_calls"], always["block_calls_baseline"]) == (27, 10 + 27, 280)
    assert always["rel_l2"] > 0.01 and always["speedup"] > 2
    assert 0 < prediction["reused_steps"] < 27 and prediction["rel_l2"] < always["rel_l2"] / 5
    for name in ("demo.png", *(row["image"] for row in result["rows"])):
        assert (tmp_path / name).stat().st_size > 500
    printed = capsys.readouterr().out
    assert all(row["name"] in printed for row in result["rows"]) and "37/280" in printed


def test_quantized_rows_keep_the_picture_and_their_thresholds_reuse_as_many_steps(monkeypatch, tmp_path, capsys):
    """Without the shift of the default threshold, prediction reuses half as many steps in FP8."""
    defaults = ("--thresholds", "0.1", "--prediction-thresholds", "0.05", "--schemes", "fp8_dynamic_per_row")
    rows = {row["name"]: row for row in run(monkeypatch, tmp_path, *defaults)["rows"]}
    assert list(rows) == [
        "baseline", "FBCache 0.10", "prediction 0.05", "FP8 dynamic per row", "FBCache + FP8", "prediction + FP8"
    ]  # fmt: skip
    fp8 = rows["FP8 dynamic per row"]
    assert 0.5 < fp8["quantized_memory"] <= 0.53 and rows["baseline"]["quantized_memory"] is None
    assert 1e-3 < fp8["rel_l2"] < 0.06 and fp8["attribute_accuracy"] == rows["baseline"]["attribute_accuracy"]
    assert fp8["reused_steps"] == 0 and "is not faster" in fp8["note"] and rows["FBCache 0.10"]["note"] == ""
    for alone, together in (("FBCache 0.10", "FBCache + FP8"), ("prediction 0.05", "prediction + FP8")):
        assert rows[together]["quantized_memory"] == fp8["quantized_memory"]
        assert rows[together]["reused_steps"] == pytest.approx(rows[alone]["reused_steps"], abs=3.5) != 0
    assert "FP8 dynamic per row and the like: cpu has no kernels for it" in capsys.readouterr().out


def test_compiled_rows_keep_picture_and_reused_steps(monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch._inductor", reason="this torch has no inductor")
    few = ("--thresholds", "0.1", "--prediction-thresholds", "--schemes", "fp8_dynamic_per_row")
    rows = {row["name"]: row for row in run(monkeypatch, tmp_path, *few, compile=True)["rows"]}
    assert list(rows)[-2:] == ["compile", "FBCache + FP8 + compile"], "no compiler"
    assert rows["compile"]["rel_l2"] < 1e-4 and rows["compile"]["reused_steps"] == 0
    assert rows["compile"]["note"].startswith("compiled in ")
    apart, together = rows["FBCache + FP8"], rows["FBCache + FP8 + compile"]
    assert together["reused_steps"] == pytest.approx(apart["reused_steps"], abs=1) != 0
    assert together["rel_l2"] == pytest.approx(apart["rel_l2"], rel=0.3)
    assert together["quantized_memory"] == apart["quantized_memory"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--thresholds", "-1"), "error: residual_diff_threshold is -1.0; allowed is 0 or more"),
        (("--prompts", "0"), "error: --prompts is 0; allowed are whole numbers from 1"),
    ],
)
def test_nonsense_gets_one_line(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(SystemExit) as exit_:
        run(monkeypatch, tmp_path, *arguments)
    assert str(exit_.value).startswith(message) and "\n" not in str(exit_.value)
    assert not list(tmp_path.iterdir())


def test_missing_weights_get_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("para_core.demo.weights.TRANSFORMER_FILE", tmp_path / "gone.safetensors")
    with pytest.raises(SystemExit, match="^error: no gone.safetensors in "):
        run(monkeypatch, tmp_path)


def test_psnr_of_equal_pictures_is_none():
    picture = torch.rand(2, 4, 4, 3)
    assert psnr(picture, picture) is None
    assert psnr((picture * 0.5), (picture * 0.5 + 0.1)) == pytest.approx(20, abs=1e-3)
