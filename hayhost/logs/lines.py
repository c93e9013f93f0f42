"""How a record looks as a line: as JSON, or for people. Whatever is in it can neither forge a line nor colour one."""

import json
import re
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

__all__ = ["Render", "as_json", "console", "escape", "shown_time"]

Render = Callable[[Mapping[str, Any]], str]

# Controls, bidirectional overrides and line separators: everything that makes a terminal show another text.
_CONTROL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
_COLOURS: Final = {"debug": "2", "info": "32", "warning": "33", "error": "31"}


def escape(text: str) -> str:
    """``text`` on one line, with every character that is not for reading spelt out."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shown_time(microseconds: int) -> str:
    """A time since the epoch as RFC 3339 has it, in UTC and to the millisecond."""
    seconds, rest = divmod(microseconds, 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest // 1000:03d}Z"


def as_json(record: Mapping[str, Any]) -> str:
    """The record as one line of JSON; what is none is shown as text."""
    try:
        text = msgspec.json.encode(record, enc_hook=str).decode()
    except UnicodeEncodeError:  # the name of a file may be no UTF-8
        text = json.dumps(record, default=str)
    return _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # JSON itself escapes only what is below U+0020


def console(colour: bool) -> Render:
    """What makes lines for people, in colours or without: one for the record, then those of its traceback."""

    def paint(code: str, text: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if colour else text

    def render(record: Mapping[str, Any]) -> str:
        event = dict(record)
        level = event.pop("level")
        message = escape(str(event.pop("event")))
        traceback = event.pop("traceback", None)
        at = time.localtime(event.pop("id") / 1e6)
        del event["time"]
        where = "/".join(str(event.pop(key)) for key in ("plugin", "org") if key in event)
        parts = [time.strftime("%H:%M:%S", at), paint(_COLOURS[level], f"{level:<7}")]
        if where:
            parts.append(paint("36", escape(where)))
        parts.append(message)
        parts += [paint("2", f"{key}={escape(str(value))}") for key, value in event.items()]
        lines = [" ".join(parts)]
        if traceback:
            lines += [f"    | {escape(line)}" for line in str(traceback).splitlines()]
        return "\n".join(lines)

    return render
