"""How much one worker or org may ask for."""

import time
from collections import OrderedDict
from typing import Final

from .resolver import Share

__all__ = ["Org", "Orgs", "TokenBucket"]

DIALS_PER_MINUTE: Final = 1200
DIALS_AT_ONCE: Final = 400
PENDING_PER_ORG: Final = 128
TUNNELS_PER_ORG: Final = 128
_REMEMBERED: Final = 10_000  # orgs whose last worker is gone: leaving and coming back does not refill anything


class TokenBucket:
    """Lets ``rate`` things per second through, and ``burst`` at once."""

    def __init__(self, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = burst
        self._tokens = float(burst)
        self._filled = time.monotonic()

    def take(self) -> bool:
        """Whether one more may pass now."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._rate)
        self._filled = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True


class Org:
    """What all workers of one org share."""

    def __init__(self, org: str) -> None:
        self.id = org
        self.workers = 0
        self.pending = 0
        self.tunnels = 0
        self.resolving = Share()
        self._dials = TokenBucket(DIALS_PER_MINUTE / 60, DIALS_AT_ONCE)

    def refusal(self, full: bool) -> str:
        """Why it may not dial now; empty if it may, which counts. ``full`` says that all orgs together do enough."""
        if not self._dials.take():
            return f"this organisation makes more than {DIALS_PER_MINUTE} connections a minute"
        if self.pending >= PENDING_PER_ORG:
            return f"{PENDING_PER_ORG} connections of this organisation are being made already"
        return "too many connections are being made" if full else ""


class Orgs:
    """All orgs that have workers, and some that had."""

    def __init__(self) -> None:
        self._orgs: OrderedDict[str, Org] = OrderedDict()

    def enter(self, org: str) -> Org:
        """One more worker of ``org``."""
        found = self._orgs.setdefault(org, Org(org))
        found.workers += 1
        self._orgs.move_to_end(org)
        return found

    def leave(self, org: Org) -> None:
        """One worker less."""
        org.workers -= 1
        while len(self._orgs) > _REMEMBERED:
            oldest = next(iter(self._orgs.values()))
            if oldest.workers:
                self._orgs.move_to_end(oldest.id)
                return
            del self._orgs[oldest.id]
