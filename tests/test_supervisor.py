"""When a worker is started again, with the clock in the test's hand."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hayhost.supervisor import FIRST_DELAY, MAX_DELAY, MAX_FAILED_STARTS, OPEN_FOR, WINDOW, Backoff, Breaker

A_MOMENT = 0.001
"""Seconds; more than the clock's rounding."""


def test_the_first_crash_is_not_waited_for() -> None:
    backoff = Backoff()
    assert backoff.remaining(0.0) == 0.0
    backoff.crashed(100.0)
    assert backoff.remaining(100.0) == 0.0


def test_the_delay_doubles_from_the_second_crash_on_up_to_its_limit() -> None:
    backoff = Backoff()
    delays = []
    for _ in range(12):
        backoff.crashed(100.0)
        delays.append(backoff.remaining(100.0))
    assert delays[:4] == pytest.approx([0.0, FIRST_DELAY, 2 * FIRST_DELAY, 4 * FIRST_DELAY])
    assert delays[-1] == pytest.approx(MAX_DELAY)
    assert all(earlier <= later for earlier, later in pairwise(delays))


def test_the_delay_runs_from_the_last_crash() -> None:
    backoff = Backoff()
    backoff.crashed(100.0)
    backoff.crashed(101.0)
    assert backoff.remaining(101.0 + FIRST_DELAY / 2) > 0.0
    assert backoff.remaining(101.0 + FIRST_DELAY + A_MOMENT) == 0.0
    assert backoff.remaining(150.0) == 0.0


def test_crashes_are_forgotten_after_the_window() -> None:
    backoff = Backoff()
    for now in (100.0, 101.0, 102.0):
        backoff.crashed(now)
    assert backoff.remaining(102.0 + WINDOW + A_MOMENT) == 0.0
    assert backoff.crashes == 0
    backoff.crashed(200.0)
    assert backoff.remaining(200.0) == 0.0  # the first one again


@given(st.lists(st.floats(0.0, 20.0), max_size=200))
def test_a_back_off_is_bounded_whatever_happens(gaps: list[float]) -> None:
    backoff, now = Backoff(), 0.0
    for gap in gaps:
        now += gap
        backoff.crashed(now)
        assert 0.0 <= backoff.remaining(now) <= MAX_DELAY + A_MOMENT
        assert backoff.crashes <= 32
    assert backoff.remaining(now + MAX_DELAY + A_MOMENT) == 0.0


def failed(breaker: Breaker, *times: float) -> Breaker:
    for now in times:
        breaker.failed(now, f"it failed at {now:g}")
    return breaker


def test_a_breaker_lets_failures_through_until_there_are_too_many() -> None:
    breaker = Breaker()
    for count in range(1, MAX_FAILED_STARTS):
        failed(breaker, float(count))
        assert not breaker.is_open
        assert breaker.refuses_for(float(count)) == 0.0
    failed(breaker, float(MAX_FAILED_STARTS))
    assert breaker.is_open
    assert breaker.refuses_for(float(MAX_FAILED_STARTS)) == OPEN_FOR
    assert breaker.reason == f"it failed at {MAX_FAILED_STARTS}"


def test_failures_far_apart_do_not_open_it() -> None:
    apart = WINDOW / (MAX_FAILED_STARTS - 1) + A_MOMENT
    breaker = failed(Breaker(), *(n * apart for n in range(3 * MAX_FAILED_STARTS)))
    assert not breaker.is_open


def test_failures_that_just_fit_the_window_open_it() -> None:
    apart = WINDOW / (MAX_FAILED_STARTS - 1)
    assert failed(Breaker(), *(n * apart for n in range(MAX_FAILED_STARTS))).is_open


def test_an_open_breaker_half_opens_after_its_time() -> None:
    breaker = failed(Breaker(), *([100.0] * MAX_FAILED_STARTS))
    assert breaker.refuses_for(100.0 + OPEN_FOR - A_MOMENT) > 0.0
    assert breaker.refuses_for(100.0 + OPEN_FOR) == 0.0
    assert breaker.is_open


def test_a_trial_that_fails_opens_it_again_at_once() -> None:
    breaker = failed(Breaker(), *([100.0] * MAX_FAILED_STARTS))
    trial = 100.0 + OPEN_FOR
    failed(breaker, trial)
    assert breaker.refuses_for(trial) == OPEN_FOR
    late = trial + 10 * WINDOW
    failed(breaker, late)  # however late: it has not worked since
    assert breaker.refuses_for(late) == OPEN_FOR


def test_a_start_that_works_closes_it_and_forgets() -> None:
    breaker = failed(Breaker(), *([100.0] * MAX_FAILED_STARTS))
    breaker.succeeded()
    assert (breaker.is_open, breaker.reason, breaker.refuses_for(100.0)) == (False, "", 0.0)
    failed(breaker, *([101.0] * (MAX_FAILED_STARTS - 1)))
    assert not breaker.is_open


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.booleans()), max_size=100))
def test_a_breaker_never_refuses_for_longer_than_its_time(events: list[tuple[float, bool]]) -> None:
    breaker, now = Breaker(), 0.0
    for gap, works in events:
        now += gap
        if breaker.refuses_for(now) > 0.0:
            assert breaker.reason
            continue  # nobody starts anything then
        if works:
            breaker.succeeded()
        else:
            breaker.failed(now, "why")
        assert 0.0 <= breaker.refuses_for(now) <= OPEN_FOR + A_MOMENT
    assert breaker.refuses_for(now + OPEN_FOR + A_MOMENT) == 0.0
