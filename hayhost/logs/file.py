"""The log in a file: lines of JSON, rotated, and read again from the end."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final, Literal

import msgspec

from .records import LEVELS, Record, Wanted

__all__ = ["LogFile", "find", "record_of"]

_CHUNK: Final = 256 << 10
# More than any record has; what is longer was written by somebody else.
_LONGEST: Final = 4 << 20


class LogFile:
    """Appends lines to ``path``. Over ``size`` bytes it becomes ``path.1``, that ``path.2``, and of all there are
    ``count``.

    When it cannot be written ``failed(reason)`` is called, once, and ``recovered(lost)`` when it can again. Only its
    owner may read it.
    """

    def __init__(
        self, path: Path, size: int, count: int, failed: Callable[[str], None], recovered: Callable[[int], None]
    ) -> None:
        self._path = path
        self._size = size
        self._count = count
        self._failed = failed
        self._recovered = recovered
        self._descriptor = -1
        self._lost = 0
        self._is_torn = False  # its last line is not whole

    def write(self, data: bytes) -> None:
        """Append whole lines, all of them or none."""
        try:
            self._open()
            if (have := os.fstat(self._descriptor).st_size) and have + len(data) > self._size:
                self._rotate()
            self._append(b"\n" + data if self._is_torn else data)
        except OSError as error:
            self._close()
            first, self._lost = not self._lost, self._lost + data.count(b"\n")
            if first:
                self._failed(error.strerror or str(error))
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self._recovered(lost)

    def _append(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            written = os.write(self._descriptor, view)
            view = view[written:]
            self._is_torn = bool(view)

    def _open(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                    return
            self._close()  # somebody has moved or removed it
        flags = (
            os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        )  # or a pipe would wait for a reader
        self._descriptor = os.open(self._path, flags, 0o600)
        os.fchmod(self._descriptor, 0o600)

    def _rotate(self) -> None:
        self._close()
        for number in range(self._count - 1, 0, -1):
            with contextlib.suppress(FileNotFoundError):
                os.replace(_numbered(self._path, number - 1), _numbered(self._path, number))
        if self._count == 1:
            os.unlink(self._path)
        self._open()

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}") if number else path


def find(path: Path, wanted: Wanted, limit: int, after: int | None = None) -> list[Record]:
    """At most ``limit`` records that are ``wanted`` in ``path`` and what was rotated away, oldest first.

    They are the last ones, or those that follow ``after``. Raises ``OSError`` if ``path`` cannot be read.
    """
    found: list[Record] = []
    least = max(wanted.since, 0 if after is None else after + 1)
    needed = [f'"{key}":"{value}"'.encode() for key in ("plugin", "org") if (value := getattr(wanted, key))]
    with contextlib.ExitStack() as stack:
        for line in _backwards(_files(path, stack)):
            if not all(part in line for part in needed):
                continue
            record = record_of(line)
            if record is None:
                continue
            if record.id < least:
                break
            if wanted.admits(record):
                found.append(record)
                if after is None and len(found) == limit:
                    break
    found.reverse()
    return found[:limit]


def _files(path: Path, stack: contextlib.ExitStack) -> list[BinaryIO]:
    """All of them, the newest first, as they are now: a rotation changes names only."""
    files: list[BinaryIO] = [stack.enter_context(path.open("rb"))]
    number = 1
    while True:
        try:
            file = stack.enter_context(_numbered(path, number).open("rb"))
        except FileNotFoundError:
            return files
        if not os.path.sameopenfile(file.fileno(), files[-1].fileno()):
            files.append(file)
        number += 1


def _backwards(files: list[BinaryIO]) -> Iterator[bytes]:
    for file in files:
        position = file.seek(0, os.SEEK_END)
        rest = b""
        while position:
            size = min(_CHUNK, position)
            position -= size
            file.seek(position)
            first, *lines = (file.read(size) + rest).split(b"\n")
            yield from filter(None, reversed(lines))
            rest = first if len(first) < _LONGEST else b""
        if rest:
            yield rest


class _Line(msgspec.Struct):
    id: int
    time: str
    level: Literal["debug", "info", "warning", "error"]
    event: str
    plugin: str = ""
    version: str = ""
    org: str = ""
    worker: int = 0
    request: str = ""
    source: Literal["host", "plugin", "worker"] = "host"
    traceback: str = ""
    dropped: int = 0


_decode: Final = msgspec.json.Decoder(_Line).decode


def record_of(line: bytes) -> Record | None:
    """The record that ``line`` is, if it is one: others may have written to the file."""
    try:
        told = _decode(line)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return Record(told.id, LEVELS[told.level], told.plugin, told.org, told.worker, told.request, line)
