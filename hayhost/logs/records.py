"""Records as they are kept, and which of them somebody wants to see."""

import json
from typing import Any, Final

import msgspec

from .lines import as_json

__all__ = ["LEVELS", "Record", "Wanted", "item"]

LEVELS: Final = {"debug": 10, "info": 20, "warning": 30, "error": 40}

_OWN: Final = ("version", "org", "worker", "request", "traceback", "dropped")


class Record(msgspec.Struct, frozen=True, gc=False):
    """A line of the log. ``id`` is its time in microseconds since the epoch, and larger than that of any record before.

    ``line`` is the whole of it as JSON; what is empty or 0 of the rest is not in it.
    """

    id: int
    level: int
    plugin: str
    org: str
    worker: int
    request: str
    line: bytes


class Wanted(msgspec.Struct, frozen=True, gc=False):
    """Which records: those that have all that is given here, from ``level`` on and not made before ``since``."""

    plugin: str | None = None
    org: str | None = None
    worker: int | None = None
    level: int = 0
    since: int = 0
    request: str | None = None
    text: str = ""
    """Is somewhere in its message, traceback or meta, in capitals or not."""

    def admits(self, record: Record) -> bool:
        """Whether ``record`` is one of them."""
        return (
            record.level >= self.level
            and record.id >= self.since
            and self.plugin in (None, record.plugin)
            and self.org in (None, record.org)
            and self.worker in (None, record.worker)
            and self.request in (None, record.request)
            and (not self.text or self._has_text(record))
        )

    def _has_text(self, record: Record) -> bool:
        text = self.text.lower()
        line = record.line.decode().lower()
        if text.isprintable() and text not in line and json.dumps(text, ensure_ascii=False)[1:-1] not in line:
            return False  # nor will it be there when the line has been decoded, which takes longer
        shown = item(record)
        told = [str(shown["event"]), str(shown.get("traceback", ""))]
        if "meta" in shown:
            told.append(as_json(shown["meta"]))
        return any(text in part.lower() for part in told)


def item(record: Record) -> dict[str, Any]:
    """A record as it is shown: what else the host says with a line of its own is ``meta``, as with a plugin's."""
    fields = msgspec.json.decode(record.line)
    shown = {key: fields.pop(key) for key in ("id", "time", "level", "event")}
    if record.plugin:
        shown["plugin"] = record.plugin
    shown |= {key: fields.pop(key) for key in _OWN if key in fields}
    fields.pop("plugin", None)
    shown["source"] = fields.pop("source", "host")
    meta = fields.pop("meta", None)
    if meta is not None and not isinstance(meta, dict):
        fields["meta"] = meta
        meta = None
    if meta or fields:
        shown["meta"] = {**fields, **(meta or {})}
    return shown
