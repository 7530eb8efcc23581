"""What the estimate of a step that is not measured is taken to be."""

import pytest

from para_core.forecast import Forecast

TIMES = [0.6, 0.7]  # newest first


def test_estimate_grows_as_the_errors_of_a_line_do():
    forecast = Forecast()
    assert forecast.at(TIMES, 0.55) is None, "nothing was measured yet"
    forecast.learn(0.01, TIMES, 0.5)
    assert forecast.at(TIMES, 0.5) == pytest.approx(0.01)
    # sqrt(distance * distance * distance to the older one)
    assert forecast.at(TIMES, 0.55) == pytest.approx(0.01 * (0.05 * 0.05 * 0.15 / (0.1 * 0.1 * 0.2)) ** 0.5)


def test_newer_measurements_count_more():
    forecast = Forecast()
    for estimate in (0.01, 0.01, 0.04):
        forecast.learn(estimate, TIMES, 0.5)
    assert forecast.at(TIMES, 0.5) == pytest.approx(0.02)


def test_twice_the_measured_distance_is_as_far_as_it_reaches():
    forecast = Forecast()
    forecast.learn(1e-9, TIMES, 0.55)
    assert forecast.at(TIMES, 0.501) is not None and forecast.at(TIMES, 0.49) is None


@pytest.mark.parametrize("at", [0.6, 0.65, 0.8], ids=["again", "between", "back"])
def test_times_that_do_not_lie_ahead_are_measured(at):
    forecast = Forecast()
    forecast.learn(0.01, TIMES, 0.3)
    assert forecast.at(TIMES, at) is None
    forecast.learn(0.01, TIMES[:1], 0.3)
    assert forecast.at(TIMES[:1], at) is None


def test_an_estimate_of_0_is_no_obstacle():
    forecast = Forecast()
    forecast.learn(0.0, [1.0], 0.9)
    assert 0 < forecast.at([1.0], 0.9) < 1e-10
    assert Forecast().at([], 0.9) is None


def test_what_one_computed_step_taught_says_nothing_of_two():
    """The rates are of different powers of time, whose unit is the model's own."""
    forecast = Forecast()
    forecast.learn(0.01, TIMES[1:], 0.6)
    assert forecast.at(TIMES, 0.5) is None
    forecast.learn(0.01, TIMES, 0.5)
    assert forecast.at(TIMES, 0.5) == pytest.approx(0.01)


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_the_unit_of_time_plays_no_part(unit):
    forecast = Forecast()
    for times, at in (([1.0], 0.9), ([0.9, 1.0], 0.8), ([0.8, 0.9], 0.6)):
        forecast.learn(0.01, [unit * time for time in times], unit * at)
    assert forecast.at([unit * 0.6, unit * 0.8], unit * 0.5) == pytest.approx(0.0078254, rel=1e-4)
