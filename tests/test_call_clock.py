"""The time of a model call, on a device that works on when the call has returned."""

import pytest

from para_core.call_clock import CallClock


def test_a_call_lasts_until_the_next_one_begins():
    clock, now = CallClock(), 0.0
    for reused in (False, True, False, True):  # each returns at once; computing takes 8 s, reusing 1 s
        clock.begin(now)
        clock.end(now, now + 0.1, reused=reused)
        now += 1.0 if reused else 8.0
    assert clock.seconds(reused=False) == 16.0
    assert clock.seconds(reused=True) == pytest.approx(1.1), "of the latest call it is known when it returned"


def test_a_call_that_failed_has_no_time():
    clock = CallClock()
    clock.begin(0.0)
    clock.begin(5.0)
    clock.end(5.0, 7.0, reused=False)
    assert [clock.seconds(reused=False), clock.seconds(reused=True)] == [2.0, 0.0]
