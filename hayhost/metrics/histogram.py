"""Durations in buckets: what every request costs is a search among bounds, and no object is made for it."""

from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

__all__ = ["BOUNDS", "Histogram", "Latency", "Recent", "Window", "quantile"]

# Renard's series R10: a figure that is read from buckets is wrong by an eighth at most.
BOUNDS: Final = (
    *(round(step * 10.0**power, 9) for power in range(-4, 2) for step in (1, 1.25, 1.6, 2, 2.5, 3.2, 4, 5, 6.4, 8)),
    100.0,
)
"""Upper bounds of the buckets, in seconds. There is one more, for what takes longer."""

_ZEROS: Final = bytes(8 * (len(BOUNDS) + 1))
_WINDOW: Final = 10.0
_KEPT: Final = 30
_HALF: Final = _WINDOW * _KEPT / 2


class Histogram:
    """Durations since the host began."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = array("Q", _ZEROS)
        self.sum = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.sum += seconds

    def merge(self, other: "Histogram") -> None:
        """Count all that ``other`` has counted."""
        _merge(self.counts, other.counts)
        self.sum += other.sum


class Window(msgspec.Struct, frozen=True, gc=False):
    """The requests of ``_WINDOW`` seconds that began ``at`` (since 1970). ``errors`` were answered 5xx."""

    at: float
    requests: int
    errors: int
    p50_ms: float | None
    p99_ms: float | None


class Latency(msgspec.Struct, frozen=True):
    """Medians and 99th percentiles in milliseconds: of the last minutes, and of each of their windows with requests,
    the oldest first."""

    p50_ms: float | None = None
    p99_ms: float | None = None
    history: list[Window] = []


class Recent:
    """The requests of one worker in the last five minutes.

    Some ten kilobytes for one that is always busy. Of a window only its figures are kept. The buckets of all are in two
    halves, of which the older is dropped: figures over all are of the last two and a half to five minutes.
    """

    __slots__ = ("_counts", "_ends", "_errors", "_halves", "_turned", "_windows")

    def __init__(self, now: float) -> None:
        self._counts = array("I", bytes(4 * (len(BOUNDS) + 1)))
        self._errors = 0
        self._windows: deque[tuple[float, Window]] = deque(maxlen=_KEPT)
        self._halves = (self._counts[:], self._counts[:])
        self._turned = now
        self._ends = (now // _WINDOW + 1) * _WINDOW

    def add(self, now: float, seconds: float, failed: bool) -> None:
        """Count a request that was answered ``now``, by the loop's clock."""
        if now >= self._ends:
            self._turn(now)
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        if failed:
            self._errors += 1

    def _turn(self, now: float) -> None:
        """Close the window that is over."""
        began = self._ends - _WINDOW
        window = self._window(began)
        if window.requests:
            self._windows.append((began, window))
            _merge(self._halves[0], self._counts)
            self._counts = array("I", bytes(4 * len(self._counts)))
            self._errors = 0
        if (passed := now - self._turned) >= _HALF:
            empty = array("I", bytes(4 * len(self._counts)))
            self._halves = (empty, self._halves[0] if passed < 2 * _HALF else empty[:])
            self._turned = now
        self._ends = (now // _WINDOW + 1) * _WINDOW

    def _window(self, began: float) -> Window:
        return Window(began, sum(self._counts), self._errors, _ms(self._counts, 0.5), _ms(self._counts, 0.99))

    def read(self, now: float, epoch: float) -> Latency:
        """What is known ``now``; ``epoch`` is when the loop's clock was 0, in seconds since 1970."""
        if now >= self._ends:
            self._turn(now)
        began = self._ends - _WINDOW
        windows = [window for at, window in self._windows if at > now - _WINDOW * _KEPT]
        if any(self._counts):
            windows.append(self._window(began))
        if not windows:
            return Latency()
        counts = self._halves[0][:]
        _merge(counts, self._halves[1])
        _merge(counts, self._counts)
        history = [msgspec.structs.replace(window, at=round(window.at + epoch, 1)) for window in windows]
        return Latency(_ms(counts, 0.5), _ms(counts, 0.99), history)


def _merge(into: "array[int]", counts: Iterable[int]) -> None:
    for bucket, count in enumerate(counts):
        if count:
            into[bucket] += count


def _ms(counts: Sequence[int], share: float) -> float | None:
    seconds = quantile(counts, share)
    return None if seconds is None else round(seconds * 1000, 3)


def quantile(counts: Sequence[int], share: float) -> float | None:
    """Seconds that a ``share`` of what was counted took at most, as far as buckets tell; ``None`` if nothing was."""
    rank = share * sum(counts)
    if not rank:
        return None
    for bucket, count in enumerate(counts):
        if rank <= count:
            above = BOUNDS[min(bucket, len(BOUNDS) - 1)]
            below = BOUNDS[bucket - 1] if bucket else 0.0
            return above if bucket == len(BOUNDS) else below + (above - below) * rank / count
        rank -= count
    return BOUNDS[-1]
