"""The host's log: one line per event, as JSON or for a terminal.

What plugins say is somebody else's text: it is bounded, rated and escaped here, so that it can neither forge a line nor
colour one.
"""

import json
import logging
import re
import sys
import time
import traceback
from collections.abc import Mapping, MutableMapping
from typing import Any, Final, TextIO

import msgspec
import structlog

from .metrics.counts import LogCounts

__all__ = ["PluginLog", "configure", "get_logger"]

# Per worker: what an operator can read, and a busy plugin's burst. The rest is counted.
_RATE: Final = 200.0  # lines per second
_BURST: Final = 1_000
_MAX_LINE: Final = 8 << 10

# Controls, bidirectional overrides and line separators: everything that makes a terminal show another text.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_COLOURS = {"debug": "2", "info": "32", "warning": "33", "error": "31"}
_CONTEXT = ("plugin", "version", "org", "worker", "request")

get_logger = structlog.get_logger


def escape(text: str) -> str:
    """``text`` on one line, with every character that is not for reading spelt out."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def configure(format: str, level: str, stream: TextIO | None = None) -> None:
    """Send all log lines, Tornado's own included, to ``stream`` (stderr) in ``format`` from ``level`` on."""
    stream = stream or sys.stderr
    console = format == "console" or (format == "auto" and stream.isatty())
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            _add_traceback,
            _console(stream.isatty()) if console else _json,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _Writer(stream),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Bridge()]
    root.setLevel(_LEVELS[level])
    logging.getLogger("tornado.general").setLevel(logging.WARNING)  # its info lines are malformed requests, per request


class _Writer:
    """Writes lines to a stream. That nobody reads it any more stops no host, and keeps none from being stopped."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def debug(self, line: str) -> None:
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            pass

    info = warning = error = debug


class _Bridge(logging.Handler):
    """Passes records of the standard library's logging (Tornado, asyncio) on to the host's log."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            extra: dict[str, str] = {}
            if record.exc_info:
                extra["traceback"] = logging.Formatter().formatException(record.exc_info)
            level = min(40, max(10, record.levelno // 10 * 10))
            get_logger().log(level, record.getMessage(), logger=record.name, **extra)
        except Exception:
            self.handleError(record)


def _add_traceback(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """That of the host's own exception, for ``get_logger().exception``."""
    if event.pop("exc_info", False):
        event["traceback"] = traceback.format_exc().rstrip()
    return event


def _json(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
    line = {"time": _now(), "level": event.pop("level"), "event": event.pop("event"), **event}
    try:
        text = msgspec.json.encode(line, enc_hook=str).decode()
    except UnicodeEncodeError:  # the name of a file may be no UTF-8
        text = json.dumps(line, default=str)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # JSON itself escapes only what is below U+0020


def _now() -> str:
    now = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"


def _console(colour: bool) -> Any:
    def paint(code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    def render(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> str:
        level = event.pop("level")
        message = escape(str(event.pop("event")))
        traceback = event.pop("traceback", None)
        where = "/".join(str(event.pop(key)) for key in ("plugin", "org") if key in event)
        parts = [time.strftime("%H:%M:%S"), paint(_COLOURS[level], f"{level:<7}")]
        if where:
            parts.append(paint("36", escape(where)))
        parts.append(message)
        parts += [paint("2", f"{key}={escape(str(value))}") for key, value in event.items()]
        lines = [" ".join(parts)]
        if traceback:
            lines += [f"    | {escape(line)}" for line in str(traceback).splitlines()]
        return "\n".join(lines)

    return render


class PluginLog:
    """The records of one plugin process, rated. Use one per worker."""

    def __init__(self, **context: Any) -> None:
        self._log = get_logger().bind(**context)
        self._tokens = float(_BURST)
        self._refilled = time.monotonic()
        self._dropped = 0
        self.counts = LogCounts()
        """Where its records are counted."""

    def bind(self, **context: Any) -> None:
        """Add to what every line says of where it is from."""
        self._log = self._log.bind(**context)

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
            extra["request"] = request[:64]
        if self._dropped:
            extra["dropped"], self._dropped = self._dropped, 0
        if fields := _meta(meta):
            if isinstance(traceback := fields.get("traceback"), str):
                extra["traceback"] = traceback
                del fields["traceback"]
            if fields:
                extra["meta"] = fields
        self._log.log(_LEVELS[level], message[:_MAX_LINE], **extra)


def _meta(encoded: bytes) -> dict[str, Any]:
    if not encoded:
        return {}
    try:
        meta = msgspec.json.decode(encoded)
    except (msgspec.DecodeError, RecursionError):
        return {"meta": "malformed"}
    return dict(meta) if isinstance(meta, Mapping) else {"meta": "malformed"}
