"""What commands print: tables and colours on a terminal, tabs between plain text otherwise, or JSON."""

import datetime as dt
import os
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TextIO

import click
import msgspec

from hayhost.logs import escape

__all__ = ["colours", "paint", "print_json", "print_table", "shown_time", "tell", "warn", "warn_of_hooks"]

_COLOURS: Final = {
    **dict.fromkeys(("enabled", "valid", "good", "ready", "ok"), "32"),
    **dict.fromkeys(("unknown", "degraded", "expired"), "33"),
    **dict.fromkeys(("invalid", "error"), "31"),
    **dict.fromkeys(("disabled", "stopped", "revoked", "-", "********"), "2"),
}


def colours(stream: TextIO | None = None) -> bool:
    """Whether ``stream`` (stdout) is a terminal, and colours are wanted."""
    return (stream or sys.stdout).isatty() and "NO_COLOR" not in os.environ


def paint(code: str, text: str, stream: TextIO | None = None) -> str:
    """``text`` in a colour, if ``stream`` (stdout) is a terminal."""
    return f"\x1b[{code}m{text}\x1b[0m" if colours(stream) else text


def print_json(value: Any) -> None:
    """One JSON value, for programs."""
    click.echo(msgspec.json.format(msgspec.json.encode(value)).decode())


def print_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table with its headings on a terminal, as wide as that is; else lines with tabs, and nothing else."""
    cells = [[escape(cell).replace("\t", " ") or "-" for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for line in cells:
            click.echo("\t".join(line))
        return
    if not cells:
        tell("(none)")
        return
    *widths, _ = (max(map(len, column)) for column in zip(headings, *cells, strict=True))
    room = max(20, shutil.get_terminal_size().columns - sum(widths) - 2 * len(widths))
    click.echo("  ".join(paint("1", text) for text in _padded(headings, widths)).rstrip())
    for line in cells:
        line[-1] = line[-1] if len(line[-1]) <= room else f"{line[-1][: room - 1]}…"
        coloured = zip(line, _padded(line, widths), strict=True)
        click.echo("  ".join(paint(_COLOURS[cell], text) if cell in _COLOURS else text for cell, text in coloured))


def _padded(cells: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [*(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=False)), cells[-1]]


def shown_time(at: dt.datetime | None) -> str:
    """A time in UTC, to the second."""
    return "-" if at is None else at.astimezone(dt.UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def tell(message: str) -> None:
    """Something for people only."""
    click.echo(escape(message), err=True)


def warn(message: str) -> None:
    """Something that is not as it should be, although the command goes on."""
    click.echo(paint("33", "warning: ", sys.stderr) + escape(message), err=True)


def warn_of_hooks(plugin: str, hooks: Mapping[str, str]) -> None:
    """Lifecycle hooks that failed; what was changed stays so."""
    for hook, reason in hooks.items():
        warn(f"{plugin}: {reason}" if reason.startswith(hook) else f"{plugin}: {hook} failed: {reason}")
