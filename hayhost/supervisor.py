"""When to start a worker again: back-off after crashes, a breaker after failed starts. No I/O and no clock here."""

from collections import deque
from typing import Final

__all__ = ["Backoff", "Breaker"]

WINDOW: Final = 60.0
"""Seconds after which a crash or a failed start is forgotten."""
MAX_FAILED_STARTS: Final = 5
OPEN_FOR: Final = 10.0
"""Seconds that an open breaker refuses before it lets one start through."""
FIRST_DELAY: Final = 0.1
MAX_DELAY: Final = 10.0


class Backoff:
    """How long to wait before the next start of a worker that died while it served.

    The first crash in a window is not waited for: the next request is served at once. From then on the delay doubles.
    """

    def __init__(self) -> None:
        self._crashes: deque[float] = deque(maxlen=32)

    def crashed(self, now: float) -> None:
        """Count a crash."""
        self._crashes.append(now)

    @property
    def crashes(self) -> int:
        """Crashes that are remembered."""
        return len(self._crashes)

    def recent(self, now: float) -> int:
        """Crashes in the window that ends ``now``."""
        return sum(now - crash <= WINDOW for crash in self._crashes)

    def remaining(self, now: float) -> float:
        """Seconds from ``now`` until the next start may be made."""
        while self._crashes and now - self._crashes[0] > WINDOW:
            self._crashes.popleft()
        if len(self._crashes) < 2:
            return 0.0
        delay = min(MAX_DELAY, FIRST_DELAY * 2.0 ** (len(self._crashes) - 2))
        return max(0.0, self._crashes[-1] + delay - now)


class Breaker:
    """Refuses starts after ``MAX_FAILED_STARTS`` failed within ``WINDOW``; half-opens for one after ``OPEN_FOR``."""

    def __init__(self) -> None:
        self._failures: deque[float] = deque(maxlen=MAX_FAILED_STARTS)
        self._opened: float | None = None
        self.reason = ""

    def failed(self, now: float, reason: str) -> None:
        """Count a start that never became ready."""
        self.reason = reason
        self._failures.append(now)
        if self._opened is not None or (len(self._failures) == MAX_FAILED_STARTS and now - self._failures[0] <= WINDOW):
            self._opened = now

    def succeeded(self) -> None:
        """Close: a start became ready, or the plugin changed."""
        self._failures.clear()
        self._opened = None
        self.reason = ""

    def refuses_for(self, now: float) -> float:
        """Seconds from ``now`` until a start may be tried; 0 if it may now."""
        return 0.0 if self._opened is None else max(0.0, self._opened + OPEN_FOR - now)

    @property
    def is_open(self) -> bool:
        """Whether the last starts failed so often that only a trial is let through."""
        return self._opened is not None
