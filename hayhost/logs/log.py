"""The host's log: what becomes of a record, and who may look at it again."""

import asyncio
import contextlib
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from .file import find
from .lines import as_json, shown_time
from .records import LEVELS, Record, Wanted
from .rings import Rings
from .writing import Writer

__all__ = ["Listener", "Log"]

# A listener that is this far behind, in records or bytes, loses some, and is told how many.
_MOST_WAITING: Final = 2_000
_MOST_BYTES: Final = 4 << 20
_FLUSH: Final = 2.0


class Listener:
    """Gets the records that are ``wanted`` as they are made, on the loop that it was made on."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._records: deque[Record] = deque()
        self._size = 0
        self._lost = 0
        self._news = asyncio.Event()
        self.closed = False
        """Whether there will be no more."""

    def give(self, record: Record) -> None:
        """A new record; from any thread."""
        if not self._wanted.admits(record):
            return
        if threading.get_ident() == self._thread:
            self._take(record)
        else:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                self._loop.call_soon_threadsafe(self._take, record)

    def _take(self, record: Record) -> None:
        if len(self._records) < _MOST_WAITING and self._size < _MOST_BYTES:
            self._records.append(record)
            self._size += len(record.line)
        else:
            self._lost += 1
        self._news.set()

    async def next(self, seconds: float) -> tuple[list[Record], int]:
        """What has come since the last call, waited for so long, and how many were lost after these."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()
        records, self._records, self._size = list(self._records), deque(), 0
        lost, self._lost = self._lost, 0
        return records, lost

    def close(self) -> None:
        """End it."""
        self.closed = True
        self._news.set()


class Log:
    """Takes records: each is written, kept in its ring, and given to those who listen."""

    def __init__(
        self,
        rings: Rings,
        write: Callable[[Mapping[str, Any]], None],
        writers: Iterable[Writer] = (),
        to_file: Writer | None = None,
        file: Path | None = None,
    ) -> None:
        """``write`` is for the stream, and ``to_file`` for ``file``; ``writers`` are all that are to be flushed."""
        self._rings = rings
        self._to_file = to_file
        self._file = file
        self._write = write
        self._writers = list(writers)
        self._lock = threading.Lock()
        self._last = 0
        self._listeners: set[Listener] = set()

    def debug(self, event: Mapping[str, Any]) -> None:
        """Take a record with at least ``level`` and ``event``; from any thread."""
        with self._lock:
            self._last = id = max(self._last + 1, time.time_ns() // 1_000)
            fields = {"id": id, "time": shown_time(id), "level": event["level"], "event": event["event"], **event}
            self._write(fields)
            record = _record(fields)
            if self._to_file is not None:
                self._to_file.put(record.line + b"\n")
            self._rings.add(record)
            for listener in self._listeners:
                listener.give(record)

    info = warning = error = debug

    async def read(self, wanted: Wanted, limit: int, after: int | None = None) -> tuple[list[Record], bool]:
        """At most ``limit`` of the records that are ``wanted``, oldest first: the last ones, or those that follow the
        id ``after``; and whether there are others after these."""
        with self._lock:
            rings, forgotten = self._rings.find(wanted)
        # Long texts are searched: not on the loop's time.
        return await asyncio.get_running_loop().run_in_executor(
            None, self._choose, rings, forgotten, wanted, limit, after
        )

    def _choose(
        self, rings: list[list[Record]], forgotten: int, wanted: Wanted, limit: int, after: int | None
    ) -> tuple[list[Record], bool]:
        if after is None:
            newest = heapq.merge(*map(reversed, rings), key=_id, reverse=True)
            chosen = list(islice(filter(wanted.admits, newest), limit))[::-1]
            is_all = len(chosen) == limit and chosen[0].id > forgotten
        else:
            oldest = (record for record in heapq.merge(*rings, key=_id) if record.id > after)
            chosen = list(islice(filter(wanted.admits, oldest), limit + 1))
            is_all = after >= forgotten
        if self._file is not None and not is_all and wanted.since <= forgotten:
            with contextlib.suppress(OSError):  # which was said when it could not be written
                older = find(self._file, wanted, limit + 1, after)
                chosen = sorted({record.id: record for record in (*older, *chosen)}.values(), key=_id)
        if after is None:
            return chosen[-limit:], False
        return chosen[:limit], len(chosen) > limit

    @contextlib.contextmanager
    def listening(self, wanted: Wanted) -> Iterator[Listener]:
        """Give a listener all that is ``wanted`` from now on."""
        listener = Listener(wanted)
        with self._lock:
            self._listeners.add(listener)
        try:
            yield listener
        finally:
            with self._lock:
                self._listeners.discard(listener)

    def end_listening(self) -> None:
        """Close all listeners that there are now."""
        with self._lock:
            listeners = list(self._listeners)
        for listener in listeners:
            listener.close()

    def flush(self, seconds: float = _FLUSH) -> None:
        """Wait until everything is written, but for not much longer than ``seconds``."""
        until = time.monotonic() + seconds
        for writer in self._writers:
            writer.flush(max(0.0, until - time.monotonic()))


def _record(fields: Mapping[str, Any]) -> Record:
    worker = fields.get("worker", 0)
    return Record(
        fields["id"],
        LEVELS[fields["level"]],
        str(fields.get("plugin", "")),
        str(fields.get("org", "")),
        worker if isinstance(worker, int) else 0,
        str(fields.get("request", "")),
        as_json(fields).encode(),
    )


def _id(record: Record) -> int:
    return record.id
