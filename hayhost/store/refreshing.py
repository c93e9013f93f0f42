"""When a token is to be refreshed, and when again if that fails. No I/O here."""

import datetime as dt
import random
from typing import Any, Final

from hayhost.installs import Auth

from .records import Installed, now

__all__ = ["CLAIM", "due", "retry", "schedule"]

CLAIM: Final = dt.timedelta(seconds=60)
"""For how long nobody else refreshes what one host has claimed, and the first pause after a failure."""
_LONGEST_PAUSE: Final = dt.timedelta(hours=1)
_LEAST: Final = dt.timedelta(seconds=10)  # until the next refresh, however short-lived a provider's tokens are
_EARLY: Final = 0.2  # of the token's life
_EARLIEST: Final = 600.0
_LAST: Final = 10_000_000_000  # 2286: far enough, and a time that both databases and datetime know


def due(auth: Auth | None, at: dt.datetime) -> dt.datetime | None:
    """When to refresh credentials that one has at ``at``; ``None`` if they do not expire, or cannot be refreshed.

    Earlier than they expire by a fifth of the time left, 10 minutes at most; by up to half of that later, so that
    tokens which were issued together do not come due together.
    """
    credentials = auth.credentials if auth is not None else {}
    expires = credentials.get("expiresAt")
    if not credentials.get("refreshToken") or isinstance(expires, bool) or not isinstance(expires, int | float):
        return None
    moment = dt.datetime.fromtimestamp(min(max(expires, 0), _LAST), dt.UTC)
    early = min(max((moment - at).total_seconds(), 0.0) * _EARLY, _EARLIEST)
    return moment - dt.timedelta(seconds=early * random.uniform(0.5, 1.0))


def retry(failures: int) -> dt.timedelta:
    """The pause after an attempt that ``failures`` others failed before: it doubles, up to an hour; then jitter."""
    return min(CLAIM * (1 << min(failures, 16)), _LONGEST_PAUSE) * random.uniform(1.0, 1.25)


def schedule(before: Installed | None, after: Installed) -> dict[str, Any]:
    """The columns to change with an installation. What a host may have claimed meanwhile is left alone."""
    if before is None or before.auth != after.auth:
        at = now()
        when = due(after.auth, at)
        if when is not None and before is not None and before.auth is not None:
            when = max(when, at + _LEAST)
        return {"refresh_at": when, "refresh_failures": 0}
    if before.auth_error and before.config != after.config and after.auth_validity != "invalid":
        return {"refresh_at": now() + CLAIM, "refresh_failures": 0}  # it may have been what is changed now
    return {}
