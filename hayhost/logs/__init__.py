"""The host's log: one line per event, as JSON or for a terminal, and the last ones in memory.

What plugins say is somebody else's text: it is bounded, rated and escaped here, so that it can neither forge a line nor
colour one.
"""

import atexit
import logging
import sys
import traceback
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final, TextIO

import structlog

from hayhost.settings import Settings

from .file import LogFile
from .lines import as_json, console, escape
from .log import Listener, Log
from .masking import MASK, secrets_in
from .plugin import PluginLog, tell_dropped
from .records import LEVELS, Record, Wanted, item
from .rings import Rings
from .writing import Writer, to_stream

__all__ = [
    "LEVELS",
    "MASK",
    "Listener",
    "Log",
    "PluginLog",
    "Record",
    "Wanted",
    "configure",
    "configure_log",
    "console",
    "current",
    "escape",
    "flush",
    "get_logger",
    "item",
    "secrets_in",
    "tell_dropped",
]

_MEMORY: Final = 64 << 20
_RECORDS: Final = 1_000
_FILE_SIZE: Final = 10 << 20
_FILES: Final = 5

get_logger = structlog.get_logger
_current: Log | None = None


def current() -> Log:
    """What ``configure`` has made last."""
    return _current or configure("auto", "info")


def flush() -> None:
    """Wait until what was logged is written, but not for long."""
    if _current is not None:
        _current.flush()


atexit.register(flush)


def configure(
    format: str,
    level: str,
    stream: TextIO | None = None,
    *,
    memory: int = _MEMORY,
    records: int = _RECORDS,
    file: Path | None = None,
    file_size: int = _FILE_SIZE,
    files: int = _FILES,
) -> Log:
    """Send all log lines, Tornado's own included, to ``stream`` (stderr) in ``format`` from ``level`` on.

    They go to ``file``, too, of which there are ``files`` at most, of ``file_size`` bytes each. The last ones are
    kept in ``memory`` bytes, ``records`` of each worker at most.
    """
    stream = stream or sys.stderr
    terminal = stream.isatty()
    render = console(terminal) if format == "console" or (format == "auto" and terminal) else _plain

    def missing(count: int) -> bytes:
        return f'{{"level":"warning","event":"log lines are missing: nobody read them","dropped":{count}}}\n'.encode()

    write_line, writer = to_stream(stream, missing)

    def write(fields: Mapping[str, Any]) -> None:
        write_line((render(fields) + "\n").encode(errors="backslashreplace"))

    writers = [writer] if writer is not None else []
    to_file: Writer | None = None
    if file is not None:
        path = file.absolute()

        def failed(reason: str) -> None:
            get_logger().error("the log file cannot be written; the log goes on without it", file=path, reason=reason)

        def recovered(lost: int) -> None:
            get_logger().warning("the log file is written again", file=path, lost=lost)

        to_file = Writer(LogFile(path, file_size, files, failed, recovered).write, missing, "log file")
        writers.append(to_file)
    global _current
    log = _current = Log(Rings(memory, records), write, writers, to_file, file)
    structlog.configure(
        processors=[structlog.processors.add_log_level, _add_traceback, _as_it_is],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: log,
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Bridge()]
    root.setLevel(LEVELS[level])
    logging.getLogger("tornado.general").setLevel(logging.WARNING)  # its info lines are malformed requests, per request
    return log


def configure_log(settings: Settings) -> Log:
    """As ``configure``, by the settings of a host."""
    return configure(
        settings.log_format,
        settings.log_level,
        memory=settings.log_memory,
        records=settings.log_records,
        file=settings.log_file,
        file_size=settings.log_file_size,
        files=settings.log_files,
    )


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


def _as_it_is(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> tuple[tuple[Any], dict[str, Any]]:
    return (event,), {}


def _plain(fields: Mapping[str, Any]) -> str:
    """Without the id, which the file has for those who look for what came after a line."""
    return as_json({key: value for key, value in fields.items() if key != "id"})
