"""Accepts connections, no more than there are descriptors for: who has asked for nothing the longest makes room."""

import asyncio
import resource
import socket
from collections.abc import Callable, Iterable
from typing import Any, Final

from tornado.httpserver import HTTPServer
from tornado.iostream import IOStream

from .front import Front
from .logs import get_logger
from .stream import ClientStream

__all__ = ["Server", "most_connections"]

_MAX_HEADER: Final = 64 << 10
_AT_ONCE: Final = 128
# A listening socket that cannot be accepted from stays readable: without a pause the loop would do nothing else.
_PAUSE: Final = 0.2
_SAID_EVERY: Final = 10.0
# More than one, or each connection over the limit would cost a look for another.
_ROOM: Final = 8
_PER_WORKER: Final = 4
_FOR_THE_HOST: Final = 64


def most_connections(max_workers: int) -> int:
    """How many connections may be open at once, such that descriptors are left for workers and for the host."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return limit - min(limit // 2, _FOR_THE_HOST + _PER_WORKER * max_workers)


class Server(HTTPServer):
    """Tornado's, with connections of the host's own kind."""

    def initialize(self, front: Front, most: int) -> None:  # type: ignore[override]  # where Tornado's servers are made
        super().initialize(
            front,
            no_keep_alive=False,
            max_header_size=_MAX_HEADER,
            max_body_size=1 << 62,  # the front has its own limit, and answers 413 where this one would hang up
        )
        self.conn_params.header_timeout = None  # the front closes idle connections, without a timer for each
        self._front = front
        self._most = most
        self._said = 0.0

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        for sock in sockets:
            self._sockets[sock.fileno()] = sock
            self._handlers[sock.fileno()] = _Acceptor(sock, self._handle_connection, self._has_room, self._said_no).stop

    def handle_stream(self, stream: IOStream, address: tuple[Any, ...]) -> None:
        sizes = {"max_buffer_size": stream.max_buffer_size, "read_chunk_size": stream.read_chunk_size}
        super().handle_stream(ClientStream(stream.socket, self._front.malformed, **sizes), address)

    def on_close(self, server_conn: object) -> None:
        super().on_close(server_conn)
        self._front.on_close(server_conn)

    def _has_room(self) -> bool:
        return len(self._connections) - len(self._front.leaving) < self._most or self._front.make_room(_ROOM) > 0

    def _said_no(self, reason: str) -> None:
        """Connections cannot be accepted now: they wait, and the kernel refuses them when too many do."""
        self._front.make_room(_ROOM)
        now = asyncio.get_running_loop().time()
        if now - self._said > _SAID_EVERY or not self._said:
            self._said = now
            get_logger().warning("connections have to wait", reason=reason, open=len(self._connections))


class _Acceptor:
    """Accepts from one listening socket while there is room."""

    def __init__(
        self,
        sock: socket.socket,
        take: Callable[[socket.socket, Any], None],
        has_room: Callable[[], bool],
        said_no: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._take = take
        self._has_room = has_room
        self._said_no = said_no
        self._loop = asyncio.get_running_loop()
        self._pause: asyncio.TimerHandle | None = None
        self._stopped = False
        self._loop.add_reader(sock, self._accept)

    def _accept(self) -> None:
        for _ in range(_AT_ONCE):
            if self._stopped:
                return
            if not self._has_room():
                self._wait("as many are open as there are descriptors for")
                return
            try:
                connection, address = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except ConnectionError:  # its client has left already
                continue
            except OSError as error:  # no descriptor or no memory for it, or the network has an error
                self._wait(error.strerror or str(error))
                return
            self._take(connection, address)

    def _wait(self, reason: str) -> None:
        self._loop.remove_reader(self._sock)
        self._pause = self._loop.call_later(_PAUSE, self._go_on)
        self._said_no(reason)

    def _go_on(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    def stop(self) -> None:
        """Accept no more."""
        self._stopped = True
        if self._pause is not None:
            self._pause.cancel()
        else:
            self._loop.remove_reader(self._sock)
