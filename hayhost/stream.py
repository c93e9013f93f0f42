"""Clients' connections: what Tornado itself would write on them is said as the host says errors."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final

from tornado.iostream import IOStream, StreamClosedError

__all__ = ["ClientStream"]

# What Tornado writes, before it closes the connection, when what it reads is no HTTP.
_BARE: Final = b"HTTP/1.1 400 Bad Request\r\n\r\n"


class ClientStream(IOStream):
    """A connection that sends at once: an answer that is complete leaves in one write.

    ``malformed()`` is the answer to what is no HTTP. In the middle of another answer, which a client might take it for
    a part of, it is not given: the connection only ends.
    """

    answering = False
    """Whether the answer to the request that is being read has been begun."""

    def __init__(self, sock: socket.socket, malformed: Callable[[], bytes], **options: Any) -> None:
        super().__init__(sock, **options)
        super().set_nodelay(True)
        self._malformed = malformed

    def set_nodelay(self, value: bool) -> None:
        """It is, always: Tornado would switch it twice for each answer."""

    def write(self, data: bytes | memoryview) -> "asyncio.Future[None]":
        if data == _BARE:
            if self.answering:
                self.close()
                broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                broken.set_exception(StreamClosedError())
                return broken
            data = self._malformed()
        return super().write(data)
