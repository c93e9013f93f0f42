"""What happens on the host, as it happens, for whoever listens."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

import msgspec

from .answers import Principal
from .errors import RequestError, StoreError

__all__ = ["Event", "Events"]

# A listener that is this far behind has missed some events, and is told so.
_MOST_WAITING: Final = 1_000
# Something is sent this often, in seconds, so that proxies and clients know that the connection lives.
_QUIET: Final = 15.0


class Event(msgspec.Struct, frozen=True):
    """``kind`` is ``plugin``, ``worker`` or ``installation``; ``data`` has no secrets. ``org`` is whose it is."""

    id: int
    kind: str
    org: str | None
    data: dict[str, Any]


_STILL_HERE: Final = Event(0, "", None, {})


class Events:
    """Gives each event to all who listen then. Nobody waits for a listener."""

    def __init__(self) -> None:
        self._listeners: set[asyncio.Queue[Event | None]] = set()
        self._last = time.time_ns() // 1_000_000  # so that ids grow over restarts
        self._closed = False

    @property
    def listeners(self) -> int:
        """How many listen."""
        return len(self._listeners)

    def publish(self, kind: str, org: str | None, data: Callable[[], dict[str, Any]]) -> None:
        """Tell all listeners; ``data`` is asked for only if there are any."""
        if not self._listeners:
            return
        self._last += 1
        event = Event(self._last, kind, org, {"at": round(time.time(), 3), **data()})
        for queue in self._listeners:
            if queue.qsize() < _MOST_WAITING:
                queue.put_nowait(event)
            elif queue.qsize() == _MOST_WAITING:
                queue.put_nowait(Event(self._last, "lost", None, {"at": event.data["at"]}))

    async def listen(
        self, principal: Principal, check: Callable[[], Awaitable[Principal]]
    ) -> AsyncGenerator[bytes, None]:
        """The events that ``principal`` may see, from now on, as ``text/event-stream``.

        It ends when ``check()`` says that they are nobody any more: it raises ``RequestError``.
        """
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        if self._closed:
            return
        self._listeners.add(queue)
        try:
            yield b": hello\n\n"
            while True:
                event: Event | None = _STILL_HERE
                with contextlib.suppress(TimeoutError):
                    event = await asyncio.wait_for(queue.get(), _QUIET)
                try:
                    if event is None or await check() != principal:
                        return
                except (RequestError, StoreError):
                    return
                if event is _STILL_HERE:
                    yield b": still here\n\n"
                    continue
                if event.org is None or principal.may(event.org):
                    data = msgspec.json.encode(event.data).decode()
                    yield f"id: {event.id}\nevent: {event.kind}\ndata: {data}\n\n".encode()
        finally:
            self._listeners.discard(queue)

    def close(self) -> None:
        """End all listening."""
        self._closed = True
        for queue in self._listeners:
            queue.put_nowait(None)
