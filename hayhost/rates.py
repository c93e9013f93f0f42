"""How many requests an org's plugin, and a plugin of all orgs, may get."""

import math
import time
from typing import TYPE_CHECKING

from .errors import RequestError
from .settings import Settings

if TYPE_CHECKING:
    from limits import RateLimitItem

__all__ = ["Rates"]


class Rates:
    """The limits of the settings ``org_rate`` and ``plugin_rate``, over windows that slide."""

    def __init__(self, settings: Settings) -> None:
        self._org: RateLimitItem | None = None
        self._plugin: RateLimitItem | None = None
        if "none" == settings.org_rate == settings.plugin_rate:
            return
        from limits import parse
        from limits.storage import MemoryStorage
        from limits.strategies import SlidingWindowCounterRateLimiter

        self._limiter = SlidingWindowCounterRateLimiter(MemoryStorage())
        if settings.org_rate != "none":
            self._org = parse(settings.org_rate)
        if settings.plugin_rate != "none":
            self._plugin = parse(settings.plugin_rate)

    def check(self, plugin: str, org: str) -> None:
        """Count a request. Raises ``RequestError`` with status 429 if it is one too many."""
        if self._org is not None:
            self._hit(self._org, "this organisation's plugin", plugin, org)
        if self._plugin is not None:
            self._hit(self._plugin, "this plugin", plugin)

    def check_org(self, org: str) -> None:
        """Count a request to what all plugins of an org answer together. Raises as ``check``."""
        if self._org is not None:
            self._hit(self._org, "this organisation", "", org)

    def _hit(self, limit: "RateLimitItem", what: str, *key: str) -> None:
        if not self._limiter.hit(limit, *key):
            wait = math.ceil(self._limiter.get_window_stats(limit, *key).reset_time - time.time())
            raise RequestError(
                f"More than {limit} requests for {what}", status=429, headers={"Retry-After": str(max(1, wait))}
            )
