"""The CONNECT proxy of one worker's programs (RFC 9110, 9.3.6), on a socket in the plugin's otherwise empty network.

It speaks CONNECT only: names are judged, and what is inside is TLS between a program and a server. Who is not the
worker's is told nothing. Everything is bounded: heads, times, connections, and what waits to be passed on.

As such a worker may connect, what it is passed must not be a connection of the host's network: it could disconnect it
and have it lead anywhere. So it gets one end of a pair in its own network, and the bytes are passed on as well.
"""

import asyncio
import base64
import errno
import hmac
import socket
from collections.abc import Callable
from typing import Final, Protocol

import h11

from .dialler import DialError
from .limits import TokenBucket
from .splice import LASTING, PATIENCE, Patience, Splice

__all__ = ["USER", "Endpoint", "Owner", "Proxy"]

Endpoint = tuple[str, int]
"""A name, as it was judged, and a port."""

USER: Final = "worker"
CONNECTIONS: Final = 64
"""Of one worker's programs at once. Further ones wait in the kernel."""

_HEAD: Final = 8 << 10
_RATE: Final = (50.0, 200)  # connections per second and at once
_PAUSE: Final = 0.05
_WRONG: Final = 1.0  # seconds that an answer to wrong credentials takes
_LINGER: Final = 1.0  # so that who still sends gets to read why it was refused
_REASON: Final = 200
_PAIR_TIMEOUT: Final = 5.0
_THREE_DESCRIPTORS: Final = socket.CMSG_LEN(12)


class Owner(Protocol):
    """The worker whose programs these are."""

    async def connect(self, host: str, port: int) -> tuple[socket.socket, Endpoint]:
        """A connection that counts until it is ``closed``. Raises ``DialError``."""

    def refused(self, host: str, port: int, error: DialError) -> None:
        """Somebody was refused before ``connect`` was called."""

    def closed(self, end: Endpoint, sent: int, received: int) -> None:
        """A connection is over; so many bytes went through it."""


class _RefusedError(Exception):
    def __init__(self, status: int, text: str, *headers: tuple[str, str]) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers


class Proxy:
    """Serves what connects to the socket that ``keeper`` hands over (``wire.MakeScratch``) and knows ``secret``.

    Takes ``keeper`` over. Raises ``OSError`` if there is no keeper any more.
    """

    def __init__(self, keeper: socket.socket, secret: str, owner: Owner, patience: Patience = PATIENCE) -> None:
        self._loop = asyncio.get_running_loop()
        self._keeper = keeper
        self._asking = asyncio.Lock()
        keeper.setblocking(False)
        [listener] = self._handed(1)
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

    def close(self, then: Callable[[], None]) -> None:
        """End it with all its connections, and call ``then`` when they are closed. Called once."""
        for task in self._tasks:
            task.cancel()

        def done(_: object) -> None:
            self._keeper.close()
            then()

        asyncio.gather(*self._tasks, return_exceptions=True).add_done_callback(done)

    # ---- for the worker itself

    async def pair(self) -> tuple[socket.socket, socket.socket]:
        """Two sockets of the plugin's network that are connected to each other. Raises ``OSError``."""
        async with self._asking, asyncio.timeout(_PAIR_TIMEOUT):
            self._keeper.send(b"\0", socket.MSG_NOSIGNAL)
            readable = asyncio.Event()
            self._loop.add_reader(self._keeper, readable.set)
            try:
                await readable.wait()
            finally:
                self._loop.remove_reader(self._keeper)
            one, other = self._handed(2)
            return one, other

    def _handed(self, count: int) -> list[socket.socket]:
        data, ancillary, _, _ = self._keeper.recvmsg(1, _THREE_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC)
        found = [number for _, _, content in ancillary for number in memoryview(content).cast("i").tolist()]
        sockets = [socket.socket(fileno=number) for number in found]
        if not data or len(sockets) != count:
            for sock in sockets:
                sock.close()
            raise OSError(errno.ENETDOWN, "the plugin's network has ended")
        for sock in sockets:
            sock.setblocking(False)
        return sockets

    def pass_on(self, client: socket.socket, server: socket.socket, end: Endpoint) -> None:
        """Pass bytes on between the two, and close them in the end."""
        splice = Splice(client, server, LASTING)

        def done(_: object) -> None:
            splice.close()
            self._owner.closed(end, splice.sent, splice.received)

        self._spawn(splice.run()).add_done_callback(done)

    # ---- for its programs

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
                self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        def done(_: object) -> None:
            client.close()
            self._places.release()

        self._spawn(self._answer(client)).add_done_callback(done)

    async def _answer(self, client: socket.socket) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_HEAD)
        try:
            await self._tunnel(client, connection)
        except _RefusedError as error:
            await self._refuse(client, connection, error)
        except OSError:
            pass  # it has gone, or been silent for too long

    async def _tunnel(self, client: socket.socket, connection: h11.Connection) -> None:
        """Raises ``_RefusedError`` before anything was answered, ``OSError`` at any time."""
        try:
            async with asyncio.timeout(self._patience.head):
                request = await self._request(client, connection)
        except TimeoutError:
            raise _RefusedError(408, "the head of the request did not come in time") from None
        host, port = await self._judge(request)
        try:
            server, end = await self._owner.connect(host, port)
        except DialError as error:
            raise _RefusedError(_status(error), error.text) from None
        answer = connection.send(h11.Response(status_code=200, headers=[], reason="Connection established"))
        splice = Splice(client, server, self._patience, connection.trailing_data[0])
        try:
            await splice.run(answer or b"")
        finally:
            splice.close()
            self._owner.closed(end, splice.sent, splice.received)

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
                while await self._loop.sock_recv(client, _HEAD):
                    pass
        except OSError:
            pass


def _status(error: DialError) -> int:
    if error.number == errno.ENOBUFS:
        return 503
    if error.policy:
        return 403
    return 504 if error.number in (errno.ETIMEDOUT, socket.EAI_AGAIN) else 502
