"""What plugin processes say: somebody else's text, so it is bounded and rated here."""

import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec
import structlog

from hayhost.metrics.counts import LogCounts

from .masking import Masker
from .records import LEVELS

__all__ = ["PluginLog"]

# Per worker: what an operator can read, and a busy plugin's burst. The rest is counted.
_RATE: Final = 200.0  # lines per second
_BURST: Final = 1_000
_MAX_LINE: Final = 8 << 10


class PluginLog:
    """The records of one plugin process, rated. Use one per worker."""

    def __init__(self, **context: Any) -> None:
        self._log = structlog.get_logger().bind(**context)
        self._masker = Masker()
        self._tokens = float(_BURST)
        self._refilled = time.monotonic()
        self._dropped = 0
        self.counts = LogCounts()
        """Where its records are counted."""

    def bind(self, **context: Any) -> None:
        """Add to what every line says of where it is from."""
        self._log = self._log.bind(**context)

    def hide(self, secrets: Iterable[str]) -> None:
        """Have these never be in anything that the process says."""
        self._masker.add(secrets)

    def masked(self, text: str) -> str:
        """``text`` of the process without what is hidden."""
        return self._masker.text(text)

    def record(self, level: str, message: str, meta: bytes = b"", request: str = "", dropped: int = 0) -> None:
        """Log one record; ``meta`` is untrusted JSON. Over the rate it is counted and left out."""
        now = time.monotonic()
        self._tokens = min(_BURST, self._tokens + (now - self._refilled) * _RATE)
        self._refilled = now
        self._dropped += dropped
        self.counts.dropped += dropped
        if self._tokens < 1:
            self._dropped += 1
            self.counts.dropped += 1
            return
        self.counts.by_level[level] += 1
        self._tokens -= 1
        extra: dict[str, Any] = {"source": "plugin"}
        if request:
            extra["request"] = self.masked(request[:64])
        if self._dropped:
            extra["dropped"], self._dropped = self._dropped, 0
        if fields := self._meta(meta):
            if isinstance(traceback := fields.get("traceback"), str):
                extra["traceback"] = traceback
                del fields["traceback"]
            if fields:
                extra["meta"] = fields
        self._log.log(LEVELS[level], self.masked(message)[:_MAX_LINE], **extra)

    def _meta(self, encoded: bytes) -> dict[str, Any]:
        if not encoded:
            return {}
        try:
            meta = msgspec.json.decode(encoded)
            return self._masker.fields(meta) if isinstance(meta, Mapping) else {"meta": "malformed"}
        except (msgspec.DecodeError, RecursionError, ValueError):
            return {"meta": "malformed"}
