"""The numbers that a run leaves, and the line that a person reads."""

import dataclasses
import json

import numpy as np

from para_core.cache_report import RunReport, StepRecord
from para_core.plot import draw_residual_curve


def report(diffs=(None, 0.2, 0.05), reused=(False, False, True), threshold=0.1, **values):
    records = tuple(StepRecord(i, 1 - i / 10, d, r) for i, (d, r) in enumerate(zip(diffs, reused, strict=True)))
    counts = {"num_calls": len(records), "num_reused_calls": sum(reused)}
    defaults = {
        "family": "flux", "residual_diff_threshold": threshold, "conditionings": {"positive": records},
        "num_block_calls": 21, "num_block_calls_baseline": 30, "seconds": 2.5, "computed_seconds": 2.0,
        "reused_seconds": 0.1, "num_bytes": 3 * 2**20,
    }  # fmt: skip
    return RunReport(**(defaults | counts | values))


def test_summary_names_what_was_reused_and_what_it_gave():
    assert report().summary() == (
        "FBCache 0.1 (flux): reused positive 1/3; blocks 21/30; 2.50 s, model about 1.43x; 3.0 MiB held"
    )


def test_summary_says_what_to_try_when_nothing_was_reused():
    line = report((None, 0.2, 0.15), (False, False, False)).summary()
    assert line.endswith(
        "Nothing was reused. With fewer than 10 steps neighbouring steps differ too much. "
        "The smallest change was 0.150: raise residual_diff_threshold or take more steps."
    )
    assert "fewer than 10" not in report((None, *[0.2] * 19), (False,) * 20).summary()
    assert report((None, 0.2, 0.1), (False,) * 3, threshold=0.0).summary().endswith("Nothing is reused at threshold 0.")


def test_report_survives_json():
    assert RunReport.from_dict(json.loads(json.dumps({"node": "3", **dataclasses.asdict(report())}))) == report()


def test_report_of_a_run_without_calls():
    empty = report((), (), conditionings={}, computed_seconds=0.0, reused_seconds=0.0)
    assert empty.estimated_speedup == 1.0
    assert "reused 0/0" in empty.summary()
    draw_residual_curve(empty)


def test_plot_marks_reused_steps_in_green():
    image = draw_residual_curve(report(), (400, 200))
    assert image.size == (400, 200)
    assert num_green(image) > 400
    without = draw_residual_curve(report((None, 0.2, 0.05), (False,) * 3), (400, 200))
    assert num_green(without) == 0


def num_green(image):
    red, green, blue = np.asarray(image).astype(int).transpose(2, 0, 1)
    return ((green > red + 60) & (green > blue)).sum()
