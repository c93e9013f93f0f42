"""What plugin processes say: somebody else's text, so it is bounded and rated here."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any, Final
from weakref import WeakValueDictionary

import msgspec
import structlog

from hayhost.metrics.counts import LogCounts

from .masking import Masker
from .records import LEVELS

__all__ = ["PluginLog", "tell_dropped"]

# Per org, whatever it has installed: what an operator can read, and a busy plugin's burst. The rest is counted.
_RATE: Final = 200.0  # lines per second
_BURST: Final = 1_000
_BYTES: Final = 256 << 10  # per second
_BURST_BYTES: Final = 4 << 20
_MAX_LINE: Final = 8 << 10
# What was left out is told after this many seconds, if nothing that is said next does so.
_TOLD_AFTER: Final = 1.0


class _Allowance:
    """How much may be said."""

    def __init__(self) -> None:
        self._lines = float(_BURST)
        self._bytes = float(_BURST_BYTES)
        self._refilled = time.monotonic()

    def take(self, size: int) -> bool:
        """Whether a record of ``size`` bytes may be said now, too."""
        now = time.monotonic()
        passed, self._refilled = now - self._refilled, now
        self._lines = min(_BURST, self._lines + passed * _RATE)
        self._bytes = min(_BURST_BYTES, self._bytes + passed * _BYTES)
        if self._lines < 1 or self._bytes < size:
            return False
        self._lines -= 1
        self._bytes -= size
        return True


_of_orgs: "WeakValueDictionary[str, _Allowance]" = WeakValueDictionary()
_untold: "set[PluginLog]" = set()


def tell_dropped() -> None:
    """Have all processes that left something out say so now."""
    for log in list(_untold):
        log.tell_dropped()


class PluginLog:
    """The records of one plugin process; those of one org are rated together. Use one per worker."""

    def __init__(self, **context: Any) -> None:
        self._log = structlog.get_logger()
        self._masker = Masker()
        self._allowance = _Allowance()
        self._dropped = 0
        self.counts = LogCounts()
        """Where its records are counted."""
        self._due: asyncio.TimerHandle | None = None
        self.bind(**context)

    def bind(self, **context: Any) -> None:
        """Add to what every line says of where it is from."""
        self._log = self._log.bind(**context)
        if (org := context.get("org")) is not None:
            allowance = _of_orgs.get(org)
            if allowance is None:
                allowance = _of_orgs[org] = _Allowance()
            self._allowance = allowance

    def hide(self, secrets: Iterable[str]) -> None:
        """Have these never be in anything that the process says."""
        self._masker.add(secrets)

    def masked(self, text: str) -> str:
        """``text`` of the process without what is hidden."""
        return self._masker.text(text)

    def record(self, level: str, message: str, meta: bytes = b"", request: str = "", dropped: int = 0) -> None:
        """Log one record; ``meta`` is untrusted JSON. Over the rate it is counted and left out."""
        self._dropped += dropped
        self.counts.dropped += dropped
        if not self._log.is_enabled_for(LEVELS[level]):
            return
        if not self._allowance.take(len(message) + len(meta)):
            self._dropped += 1
            self.counts.dropped += 1
            self._tell_later()
            return
        self.counts.by_level[level] += 1
        extra: dict[str, Any] = {"source": "plugin"}
        if request:
            extra["request"] = self.masked(request[:64])
        if self._dropped:
            extra["dropped"] = self._told()
        if fields := self._meta(meta):
            if isinstance(traceback := fields.get("traceback"), str):
                extra["traceback"] = traceback
                del fields["traceback"]
            if fields:
                extra["meta"] = fields
        self._log.log(LEVELS[level], self.masked(message)[:_MAX_LINE], **extra)

    @property
    def left_out(self) -> int:
        """How much was left out since that was last said."""
        return self._dropped

    def _tell_later(self) -> None:
        if self._due is None:
            try:
                loop = asyncio.get_running_loop()
            except RuntimeError:  # nobody waits here: the next record says it
                return
            self._due = loop.call_later(_TOLD_AFTER, self.tell_dropped)
            _untold.add(self)

    def tell_dropped(self) -> None:
        """Say how much was left out since that was last said, if anything."""
        if count := self._told():
            self._log.warning("log lines were left out: there were too many", source="host", dropped=count)

    def _told(self) -> int:
        if self._due is not None:
            self._due.cancel()
            self._due = None
            _untold.discard(self)
        count, self._dropped = self._dropped, 0
        return count

    def _meta(self, encoded: bytes) -> dict[str, Any]:
        if not encoded:
            return {}
        try:
            meta = msgspec.json.decode(encoded)
            return self._masker.fields(meta) if isinstance(meta, Mapping) else {"meta": "malformed"}
        except (msgspec.DecodeError, RecursionError, ValueError):
            return {"meta": "malformed"}
