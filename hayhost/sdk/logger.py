"""The plugin's logger."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

from ._checks import checked

__all__ = ["Level", "Logger", "Sink"]

Level = Literal["debug", "info", "warning", "error"]
Sink = Callable[[Level, str, Mapping[str, Any] | None], None]


class Logger:
    """``ctx.logger``: each call is one record of the host's log, with the plugin and org it came from.

    ``meta`` is structured data beside the message; values that are not JSON are logged as their ``repr``.
    """

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    @checked
    def debug(self, message: str, meta: Mapping[str, Any] | None = None) -> None:
        """Log what only a developer wants to see."""
        self._sink("debug", message, meta)

    @checked
    def info(self, message: str, meta: Mapping[str, Any] | None = None) -> None:
        """Log what happened."""
        self._sink("info", message, meta)

    @checked
    def warning(self, message: str, meta: Mapping[str, Any] | None = None) -> None:
        """Log what is odd but was dealt with."""
        self._sink("warning", message, meta)

    warn = warning

    @checked
    def error(self, message: str, meta: Mapping[str, Any] | None = None) -> None:
        """Log what went wrong."""
        self._sink("error", message, meta)
