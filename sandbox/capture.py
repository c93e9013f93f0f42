"""Everything a plugin says, from its logger, ``print``, ``logging`` and stderr, as bounded log frames."""

import asyncio
import contextvars
import io
import logging
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from hayhost.sdk.logger import Level

from . import wire

__all__ = ["Capture", "request_id"]

request_id: contextvars.ContextVar[str] = contextvars.ContextVar("request_id", default="")
"""The request in whose handler a record was made."""

# The front enforces its own limits; these keep an honest but noisy plugin from spending its own time on sending.
_RATE: Final = 200.0  # records per second
_BURST: Final = 1_000
_MAX_MESSAGE: Final = 8 << 10
_MAX_META: Final = 32 << 10
# What was dropped is told after this many seconds, if no record that follows does so.
_TOLD_AFTER: Final = 1.0


Send = Callable[[wire.Message], object]


class Capture:
    """Sends records as frames. One per process; ``send`` is exchanged when a worker is forked off.

    What ``send`` answers with ``False`` to was not sent.
    """

    def __init__(self, send: Send) -> None:
        self._streams: list[_Lines] = []
        self.rebind(send)

    def rebind(self, send: Send, loop: asyncio.AbstractEventLoop | None = None) -> None:
        """Send to someone else from now on, with a full allowance. On ``loop`` what was dropped is told in the end."""
        self._send = send
        self._loop = loop
        self._due = False
        self._lock = threading.Lock()
        self._tokens = float(_BURST)
        self._refilled = time.monotonic()
        self._dropped = 0
        for stream in self._streams:
            stream.reset()

    def install(self) -> None:
        """Take over ``sys.stdout``, ``sys.stderr`` and the root logger of this process."""
        for name, level, descriptor in (("stdout", "info", 1), ("stderr", "warning", 2)):
            lines = _Lines(self, level, descriptor)  # type: ignore[arg-type]  # a literal, from the row above
            self._streams.append(lines)
            text = io.TextIOWrapper(
                lines,
                encoding="utf-8",
                errors="backslashreplace",
                write_through=True,  # type: ignore[type-var]
            )  # a raw stream: with write_through nothing needs a buffer between
            setattr(sys, name, text)
        root = logging.getLogger()
        root.handlers[:] = [_Handler(self)]
        root.setLevel(logging.INFO)

    def log(self, level: Level, message: str, meta: Mapping[str, Any] | None = None) -> None:
        """Send one record, shortened to what a record may be; over the rate it is counted and dropped."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(_BURST, self._tokens + (now - self._refilled) * _RATE)
            self._refilled = now
            allowed = self._tokens >= 1
            if allowed:
                self._tokens -= 1
                dropped, self._dropped = self._dropped, 0
        if not allowed:
            self._drop(1)
            return
        if len(message) > _MAX_MESSAGE:
            message = f"{message[:_MAX_MESSAGE]}… ({len(message) - _MAX_MESSAGE} more characters)"
        message = message.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not UTF-8
        if self._send(wire.Log(level, message, _encode_meta(meta), request_id.get(), dropped)) is False:
            self._drop(dropped + 1)

    def _drop(self, count: int) -> None:
        with self._lock:
            self._dropped += count
            wake, self._due = not self._due, True
        if wake and self._loop is not None:
            self._loop.call_soon_threadsafe(self._loop.call_later, _TOLD_AFTER, self._tell_dropped)

    def _tell_dropped(self) -> None:
        with self._lock:
            self._due = False
            dropped, self._dropped = self._dropped, 0
        message = "log lines were left out: there were too many"
        if dropped and self._send(wire.Log("warning", message, b"", "", dropped)) is False:
            self._drop(dropped)

    def flush(self) -> None:
        """Send what was written without an end of line, and how much was dropped."""
        for stream in self._streams:
            stream.end_line()
        self._tell_dropped()


def _encode_meta(meta: Mapping[str, Any] | None) -> bytes:
    if not meta:
        return b""
    try:
        encoded = msgspec.json.encode({str(key): value for key, value in meta.items()}, enc_hook=repr)
    except Exception as error:  # a repr of the author's may raise anything; a log call must not
        return msgspec.json.encode({"meta": f"cannot be encoded: {type(error).__name__}"})
    if len(encoded) > _MAX_META:
        return msgspec.json.encode({"meta": f"left out: {len(encoded)} bytes"})
    return encoded


class _Lines(io.RawIOBase):
    """A binary stream that makes a record of each line."""

    def __init__(self, capture: Capture, level: Level, descriptor: int) -> None:
        super().__init__()
        self._capture = capture
        self._level = level
        self._descriptor = descriptor
        self.reset()

    def reset(self) -> None:
        self._lock = threading.RLock()
        self._partial = b""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._descriptor

    def write(self, data: Any) -> int:
        data = bytes(data)
        with self._lock:
            *lines, self._partial = (self._partial + data).split(b"\n")
            if len(self._partial) > _MAX_MESSAGE:
                lines.append(self._partial)
                self._partial = b""
        for line in lines:
            self._record(line)
        return len(data)

    def end_line(self) -> None:
        with self._lock:
            line, self._partial = self._partial, b""
        self._record(line)

    def _record(self, line: bytes) -> None:
        text = line.decode("utf-8", "replace").rstrip("\r")
        if text.strip():
            self._capture.log(self._level, text)


class _Handler(logging.Handler):
    def __init__(self, capture: Capture) -> None:
        super().__init__()
        self._capture = capture
        self.setFormatter(logging.Formatter())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            number = record.levelno
            level: Level = (
                "error" if number >= 40 else "warning" if number >= 30 else "info" if number >= 20 else "debug"
            )
            self._capture.log(level, text, {"logger": record.name})
        except Exception:
            self.handleError(record)
