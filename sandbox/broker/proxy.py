"""The CONNECT proxy of one worker's programs (RFC 9110, 9.3.6), on a socket in the plugin's otherwise empty network.

It speaks CONNECT only: names are judged, and what is inside is TLS between a program and a server. Who is not the
worker's is told nothing. Everything is bounded: heads, times, connections, and what waits to be passed on.
"""

import asyncio
import base64
import errno
import hmac
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Final, Protocol

import h11

from .dialler import DialError
from .limits import TokenBucket

__all__ = ["USER", "Owner", "Patience", "Proxy"]

USER: Final = "worker"
CONNECTIONS: Final = 64
"""Of one worker's programs at once. Further ones wait in the kernel."""

_HEAD: Final = 8 << 10
_CHUNK: Final = 64 << 10  # all that is kept of a connection, for each way
_RATE: Final = (50.0, 200)  # connections per second and at once
_PAUSE: Final = 0.05
_WRONG: Final = 1.0  # seconds that an answer to wrong credentials takes
_LINGER: Final = 1.0  # so that who still sends gets to read why it was refused
_REASON: Final = 200


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds."""

    head: float = 10.0
    """For a program to say where to."""
    idle: float = 300.0
    """Without a byte in either direction."""
    total: float = 6 * 3600.0
    """Of a connection."""


class Owner(Protocol):
    """The worker whose programs these are."""

    def connect(self, host: str, port: int) -> AbstractAsyncContextManager[socket.socket]:
        """A connection, which ends with the context. Raises ``DialError``."""

    def refused(self, host: str, port: int, error: DialError) -> None:
        """Somebody was refused before ``connect`` was called."""

    def closed(self, host: str, port: int, sent: int, received: int) -> None:
        """A connection that ``connect`` has made is over; so many bytes went through it."""


class _RefusedError(Exception):
    def __init__(self, status: int, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


class Proxy:
    """Serves what connects to ``listener``, which is closed in the end, and knows ``secret``."""

    def __init__(self, listener: socket.socket, secret: str, owner: Owner, patience: Patience = Patience()) -> None:
        self._loop = asyncio.get_running_loop()
        self._credentials = base64.b64encode(f"{USER}:{secret}".encode())
        self._owner = owner
        self._patience = patience
        self._places = asyncio.Semaphore(CONNECTIONS)
        self._tasks: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        self._spawn(self._accept(listener))

    def _spawn(self, coroutine: "asyncio._CoroutineLike[None]") -> "asyncio.Task[None]":
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.result()

    def close(self) -> None:
        """End it with all its connections. Closing twice is safe."""
        for task in self._tasks:
            task.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        bucket = TokenBucket(*_RATE)
        with listener:
            while True:
                if not bucket.take():
                    await asyncio.sleep(_PAUSE)
                    continue
                await self._places.acquire()
                try:
                    client, _ = await self._loop.sock_accept(listener)
                except OSError:  # no descriptor is free, or the program has left again
                    self._places.release()
                    await asyncio.sleep(_PAUSE)
                    continue
                self._spawn(self._serve(client)).add_done_callback(lambda _: self._places.release())

    async def _serve(self, client: socket.socket) -> None:
        with client:
            connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD)
            try:
                await self._tunnel(client, connection)
            except _RefusedError as error:
                await self._refuse(client, connection, error)
            except OSError:
                pass  # one of the two has gone, or been silent for too long

    async def _tunnel(self, client: socket.socket, connection: h11.Connection) -> None:
        """Raises ``_RefusedError`` before anything was answered, ``OSError`` at any time."""
        try:
            async with asyncio.timeout(self._patience.head):
                request = await self._request(client, connection)
        except TimeoutError:
            raise _RefusedError(408, "the head of the request did not come in time") from None
        host, port = await self._judge(request)
        try:
            async with self._owner.connect(host, port) as server:
                answer = connection.send(h11.Response(status_code=200, headers=[], reason="Connection established"))
                await self._splice(client, server, (host, port), answer or b"", connection.trailing_data[0])
        except DialError as error:
            raise _RefusedError(_status(error), error.text) from None

    async def _request(self, client: socket.socket, connection: h11.Connection) -> h11.Request:
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await self._loop.sock_recv(client, _HEAD))
            if isinstance(event, h11.Request):
                if event.method == b"CONNECT" and not isinstance(connection.next_event(), h11.EndOfMessage):
                    raise _RefusedError(400, "CONNECT has no content")
                return event
        except h11.RemoteProtocolError as error:
            raise _RefusedError(error.error_status_hint, str(error)) from None
        raise ConnectionResetError(errno.ECONNRESET, "it has left without a word")

    async def _judge(self, request: h11.Request) -> tuple[str, int]:
        target = request.target.decode("ascii", "replace")
        host, colon, digits = target.rpartition(":")
        given = [value for name, value in request.headers if name == b"proxy-authorization"]
        if not self._knows(given):
            challenge = ("Proxy-Authenticate", 'Basic realm="hayhost"')
            if given:
                text = "wrong credentials for the proxy"
                self._owner.refused(host[:_REASON], 0, DialError(errno.EACCES, text, policy=True))
                await asyncio.sleep(_WRONG)
                raise _RefusedError(407, text, challenge)
            raise _RefusedError(407, "the proxy needs the credentials that are in HTTPS_PROXY", challenge)
        if request.method != b"CONNECT":
            text = "this proxy speaks CONNECT only, so use https: or have the program tunnel (curl --proxytunnel)"
            raise _RefusedError(405, text, ("Allow", "CONNECT"))
        if not colon or not digits.isdecimal() or len(digits) > 5 or not 1 <= int(digits) <= 65535:
            raise _RefusedError(400, "CONNECT needs a host and a port")
        return host[1:-1] if host.startswith("[") and host.endswith("]") else host, int(digits)

    def _knows(self, given: list[bytes]) -> bool:
        if len(given) != 1:
            return False
        scheme, _, credentials = given[0].partition(b" ")
        return scheme.lower() == b"basic" and hmac.compare_digest(credentials.strip(), self._credentials)

    async def _splice(
        self, client: socket.socket, server: socket.socket, endpoint: tuple[str, int], answer: bytes, early: bytes
    ) -> None:
        """Pass on what comes from either side, until both have ended, one fails, or it takes too long."""
        sent, received = _Way(client, server, early), _Way(server, client, answer, -len(answer))
        try:
            async with asyncio.timeout(self._patience.total), asyncio.timeout(self._patience.idle) as idle:

                def moved() -> None:
                    idle.reschedule(self._loop.time() + self._patience.idle)

                async with asyncio.TaskGroup() as ways:
                    for way in (sent, received):
                        ways.create_task(way.run(moved))
        except* OSError:
            pass
        finally:
            self._owner.closed(*endpoint, sent.bytes, max(0, received.bytes))

    async def _refuse(self, client: socket.socket, connection: h11.Connection, error: _RefusedError) -> None:
        reason = "".join(char if " " <= char <= "~" else "?" for char in error.text)
        body = f"{reason}\n".encode()
        headers = [
            ("Content-Type", "text/plain; charset=utf-8"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
            *error.headers,
        ]
        # In the first line as well, which is all that many programs show.
        response = h11.Response(status_code=error.status, headers=headers, reason=reason[:_REASON])
        parts = [connection.send(event) for event in (response, h11.Data(data=body), h11.EndOfMessage())]
        try:
            async with asyncio.timeout(_LINGER):
                await self._loop.sock_sendall(client, b"".join(part for part in parts if part))
                client.shutdown(socket.SHUT_WR)
                while await self._loop.sock_recv(client, _CHUNK):
                    pass
        except OSError:
            pass


class _Way:
    """One direction. ``first`` goes before what comes; ``bytes`` counts what has gone."""

    def __init__(self, source: socket.socket, sink: socket.socket, first: bytes, count: int = 0) -> None:
        self._source = source
        self._sink = sink
        self._first = first
        self.bytes = count

    async def run(self, moved: Callable[[], None]) -> None:
        """Pass on until the end, and then the end as well. Raises ``OSError``."""
        loop = asyncio.get_running_loop()
        data = self._first or await loop.sock_recv(self._source, _CHUNK)
        while data:
            await loop.sock_sendall(self._sink, data)
            self.bytes += len(data)
            moved()
            data = await loop.sock_recv(self._source, _CHUNK)
        self._sink.shutdown(socket.SHUT_WR)


def _status(error: DialError) -> int:
    if error.number == errno.ENOBUFS:
        return 503
    if error.policy:
        return 403
    return 504 if error.number in (errno.ETIMEDOUT, socket.EAI_AGAIN) else 502
