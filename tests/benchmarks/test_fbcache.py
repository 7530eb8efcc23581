"""The benchmark measures what it says: blocks are counted, samplers have their order, budgets are met."""

import json
import math

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed: pip install diffusers")

from benchmarks import methods  # noqa: E402
from benchmarks.budgets import Figures, ThresholdSearch, at_budget  # noqa: E402
from benchmarks.chart import draw_chart  # noqa: E402
from benchmarks.measurement import Bench, Task  # noqa: E402
from benchmarks.results import as_json, tables  # noqa: E402
from benchmarks.samplers import Schedule  # noqa: E402
from benchmarks.subject import BlockCalls, Subject, velocity_of, write_snapshot  # noqa: E402

NUM_STEPS = 6


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    file = tmp_path_factory.mktemp("benchmark") / "model.safetensors"
    assert write_snapshot("random:3", file) == "random:3"
    return Bench(Subject(file, 1, trained=False), file.parent)


def method_named(name):
    return next(method for method in methods.all_methods() if method.name == name)


def test_smoke_run_has_the_files_shape(bench):
    schedule = Schedule("euler", NUM_STEPS)
    chosen = [method_named("ours o0"), method_named("diffusers FBC")]
    tasks = [Task(schedule, method, methods.BUDGETS) for method in (None, *chosen)]
    result = as_json("random:3", 1, [bench.measure(task) for task in tasks], {})
    (cell,) = json.loads(json.dumps(result))["cells"]
    assert (cell["sampler"], cell["steps"], cell["calls"]) == ("euler", NUM_STEPS, NUM_STEPS)
    ours, other = cell["methods"]
    assert ours["error_switched_off"] == other["error_switched_off"] == 0
    for method in cell["methods"]:
        assert any(point["saved"] > 0.2 and point["rel_l2"] > 0 for point in method["points"])
        assert set(method["at_budget"]) == {"0.25", "0.5", "0.7"}
    # Order 0 is the published first-block cache: at one threshold both do the same.
    for name in ("saved", "rel_l2"):
        assert [p[name] for p in ours["points"]] == pytest.approx([p[name] for p in other["points"]], rel=1e-4)
    assert "ours o0 1.00" in tables(result)
    assert draw_chart(result).width > 800


@pytest.mark.parametrize("name", ["ours o0", "diffusers FBC"])
def test_runs_do_not_know_of_each_other(bench, name):
    schedule, method = Schedule("heun", NUM_STEPS), method_named(name)
    first, saved = bench.run(method, 100.0, 0, schedule)
    num_blocks = len(bench.subject.attention_shares)
    assert saved == pytest.approx((1 - 1 / schedule.num_calls) * (1 - 1 / num_blocks))
    assert torch.equal(bench.run(method, 100.0, 0, schedule)[0], first)


def test_computed_blocks_count_once_and_attention_alone_by_its_share(bench):
    subject = bench.subject
    transformer = subject.fresh()
    calls = BlockCalls(transformer, subject.attention_shares)
    with torch.no_grad():
        velocity_of(transformer, subject.cases[0])(subject.cases[0].tokens, torch.tensor(1.0))
    assert calls.saved(1) == pytest.approx(0)
    assert all(0.2 < share < 0.5 for share in subject.attention_shares.values())


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_samplers_have_their_order(sampler, order):
    def velocity(x, sigma):
        return torch.sin(3 * sigma) + 0.5 * x

    def final(num_steps, name=sampler):
        return float(Schedule(name, num_steps).sample(velocity, torch.tensor(1.0, dtype=torch.float64)))

    exact = final(4096, "heun")
    measured = math.log2(abs(final(64) - exact) / abs(final(256) - exact)) / 2
    assert measured > order - 0.4  # linear sigmas are uneven in log sigma, which costs dpmpp_2m a logarithm


def test_threshold_search_lands_on_a_staircase():
    asked = []

    def saved(threshold):
        asked.append(threshold)
        return round(min(max(0.3 * math.log10(threshold / 1e-4), 0), 0.9) * 50) / 50

    search = ThresholdSearch(saved)
    for share in (0.25, 0.5, 0.7):
        assert abs(saved(search.find(share, 0.1)) - share) <= 0.0101
    assert search.find(0.95, 0.1) is None
    assert len(asked) < 40


def test_budget_between_settings_is_linear_in_log_error():
    points = [Figures(0.4, 1e-3, 50.0, 1.0), Figures(0.6, 1e-1, 30.0, 0.9)]
    found = at_budget(points, 0.5)
    assert found.how == "interpolated"
    assert found.figures.rel_l2 == pytest.approx(1e-2)
    assert (found.figures.psnr_db, found.figures.attribute_accuracy) == (pytest.approx(40), pytest.approx(0.95))
    assert at_budget(points, 0.61).how == "extrapolated"
    assert at_budget(points, 0.25).how == at_budget([], 0.5).how == "out of reach"
    assert at_budget(points, 0.402).how == "measured"
