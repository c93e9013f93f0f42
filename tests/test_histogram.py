"""Durations in buckets, and the figures that are read from them."""

import random
from array import array
from statistics import quantiles

import pytest

from hayhost.metrics.histogram import BOUNDS, Histogram, Latency, Recent, quantile


def _counts(seconds: list[float]) -> "array[int]":
    histogram = Histogram()
    for each in seconds:
        histogram.add(each)
    return histogram.counts


def test_bounds_are_in_order_and_end_a_bucket() -> None:
    assert list(BOUNDS) == sorted(set(BOUNDS))
    for index, bound in enumerate(BOUNDS):
        assert _counts([bound])[index] == 1
        assert _counts([bound * 1.0001])[index + 1] == 1


def test_what_is_beyond_all_bounds_is_counted() -> None:
    assert quantile(_counts([1e9]), 0.5) == BOUNDS[-1]
    assert quantile(_counts([0.0]), 1.0) == BOUNDS[0]
    assert quantile(_counts([]), 0.5) is None


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_quantiles_are_near_the_true_ones(share: float) -> None:
    source = random.Random(7)
    seconds = [source.lognormvariate(-5, 1) for _ in range(10_000)]
    true = quantiles(seconds, n=100)[round(share * 100) - 1]
    found = quantile(_counts(seconds), share)
    assert found is not None
    assert true / 1.15 < found < true * 1.15


def test_merging_counts_all() -> None:
    one, other = Histogram(), Histogram()
    one.add(0.5)
    other.add(0.5)
    other.add(3.0)
    one.merge(other)
    assert (sum(one.counts), one.sum) == (3, 4.0)


def test_windows_of_recent_requests() -> None:
    recent = Recent(1000.0)
    assert recent.read(1000.0, 0.0) == Latency()
    recent.add(1001.0, 0.010, False)
    recent.add(1009.0, 0.010, True)
    recent.add(1010.0, 0.100, False)
    recent.add(1035.0, 0.100, False)
    read = recent.read(1036.0, 5e8)
    assert [(window.at, window.requests, window.errors) for window in read.history] == [
        (5e8 + 1000, 2, 1),
        (5e8 + 1010, 1, 0),
        (5e8 + 1030, 1, 0),
    ]
    first = read.history[0]
    assert first.p50_ms is not None
    assert first.p99_ms is not None
    assert 8 <= first.p50_ms <= first.p99_ms <= 10
    assert read.p50_ms is not None
    assert 8 <= read.p50_ms <= 10 < 80 <= (read.p99_ms or 0) <= 100


def test_what_is_long_ago_is_forgotten() -> None:
    recent = Recent(0.0)
    for second in range(1_000):
        recent.add(float(second), 0.010 if second < 500 else 0.100, False)
    read = recent.read(999.0, 0.0)
    assert len(read.history) <= 31
    assert all(window.requests == 10 for window in read.history)
    assert read.history[0].at >= 690
    assert (read.p50_ms or 0) > 50
    idle = recent.read(1_400.0, 0.0)
    assert idle == Latency()
