"""The numbers that a run leaves, and the line that a person reads."""

import dataclasses
import json

import numpy as np

from para_core.cache_report import RunReport, StepRecord
from para_core.plot import draw_residual_curve, draw_text


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
        "FBCache (flux, first_block, residual_diff_threshold 0.1): reused positive 1/3; blocks 21/30; 2.50 s, "
        "model about 1.43x; 3.0 MiB held"
    )


def test_steps_that_were_reused_unmeasured_are_told_apart():
    found = report((None, 0.02, None, 0.2), (False, True, True, False))
    assert "positive: 2 of 4 steps reused, 1 of them without even the first block\n" in found.text()
    assert "positive: 1 of 3 steps reused\n" in report().text()
    picture = np.asarray(draw_residual_curve(found))
    reused = np.all(picture == (64, 176, 120), -1).sum(0) > 0  # columns: two of the four cells
    assert 0.4 < reused.sum() / (picture.shape[1] - 58 - 12) < 0.6


def test_summary_says_what_to_try_when_nothing_was_reused():
    line = report((None, 0.2, 0.15), (False, False, False)).summary()
    assert line.endswith(
        "Nothing was reused. With fewer than 10 steps neighbouring steps differ too much. "
        "The smallest difference was 0.150. Raise residual_diff_threshold or take more steps."
    )
    assert "fewer than 10" not in report((None, *[0.2] * 19), (False,) * 20).summary()
    assert report((None, 0.2, 0.1), (False,) * 3, threshold=0.0).summary().endswith("Nothing is reused at threshold 0.")


def test_few_steps_are_those_of_the_schedule():
    """A run that was stopped early had enough of them."""
    stopped = report((None, 0.2, 0.15), (False,) * 3, num_steps=28)
    assert "fewer than 10" not in stopped.advice()


def test_advice_does_not_ask_for_a_higher_threshold_where_the_threshold_was_not_the_reason():
    advice = report((None, 0.02, 0.03), (False,) * 3).advice()
    assert advice == (
        "Nothing was reused: start_percent, end_percent, warmup_steps or too few steps leave no room for it."
    )
    assert report((None, 0.2, 0.3), (False,) * 3, target_speedup=2.0).advice() == advice


def test_target_speedup_stands_in_for_the_threshold():
    with_target = report(target_speedup=2.0, decision="prediction")
    assert with_target.text().startswith("FBCache (flux), decision prediction, target_speedup 2\n")
    assert "(flux, prediction, target_speedup 2)" in with_target.summary()


def test_smallest_difference_is_what_a_batch_of_conditionings_would_need():
    records = {
        label: tuple(StepRecord(i, 1 - i / 10, d, False) for i, d in enumerate((None, *diffs)))
        for label, diffs in {"positive": (0.05, 0.3), "negative": (0.4, 0.2)}.items()
    }
    assert "The smallest difference was 0.300" in report((), (), conditionings=records, num_calls=3).advice()


def test_text_has_a_line_for_each_fact():
    assert report().text().splitlines() == [
        "FBCache (flux), decision first_block, residual_diff_threshold 0.1",
        "positive: 1 of 3 steps reused",
        "Blocks: 21 of 30 calls computed, 30% saved",
        "Time: 2.50 s measured; model about 1.43x as fast (estimate)",
        "Memory: 3.00 MiB of residuals held",
    ]
    nothing = report((None, 0.2, 0.15), (False,) * 3)
    assert nothing.text().splitlines()[-1] == nothing.advice()


def test_text_counts_evaluations_where_a_step_has_several():
    records = tuple(StepRecord(i // 2, 1 - i / 10, 0.05, i > 1) for i in range(6))
    assert "positive: 4 of 6 evaluations reused" in report((), (), conditionings={"positive": records}).text()


def test_report_survives_json():
    assert RunReport.from_dict(json.loads(json.dumps({"node": "3", **dataclasses.asdict(report())}))) == report()


def test_report_of_a_run_without_calls():
    empty = report((), (), conditionings={}, computed_seconds=0.0, reused_seconds=0.0)
    assert empty.estimated_speedup == 1.0
    assert "reused 0/0" in empty.summary()
    assert "Blocks: 21 of 30" in empty.text() and empty.advice() == ""
    draw_residual_curve(empty)


def test_plot_marks_reused_steps_in_green():
    image = draw_residual_curve(report(), (400, 200))
    assert image.size == (400, 200)
    assert num_green(image) > 400
    without = draw_residual_curve(report((None, 0.2, 0.05), (False,) * 3), (400, 200))
    assert num_green(without) == 0


def test_plot_makes_room_for_its_title_and_has_the_wanted_size():
    title = "\n".join(f"line {number}" for number in range(6))
    image = draw_residual_curve(report(), (400, 300), title, density=2)
    assert image.size == (800, 600)
    one_line = draw_residual_curve(report(), (400, 300), "line 0", density=2)
    assert highest_coloured_row(image) > highest_coloured_row(one_line) + 5 * 2 * 10


def test_plot_has_no_threshold_where_a_target_decided():
    assert num_red(draw_residual_curve(report(), (400, 200))) > 100
    assert num_red(draw_residual_curve(report(target_speedup=2.0), (400, 200))) == 0


def test_long_lines_are_wrapped():
    image = draw_text("a long line " * 20, 300)
    assert image.width == 300 and image.height > 3 * 16
    assert np.asarray(image)[:, -8:].min() == 255, "nothing runs off the edge"


def highest_coloured_row(image):
    pixels = np.asarray(image).astype(int)
    return int((pixels.max(-1) - pixels.min(-1) > 100).any(1).argmax())


def num_green(image):
    red, green, blue = np.asarray(image).astype(int).transpose(2, 0, 1)
    return ((green > red + 60) & (green > blue)).sum()


def num_red(image):
    red, green, blue = np.asarray(image).astype(int).transpose(2, 0, 1)
    return ((red > green + 60) & (red > blue + 60)).sum()
