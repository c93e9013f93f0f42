"""Passing bytes on between two connections, both ways, with at most a chunk of each kept."""

import asyncio
import socket
from dataclasses import dataclass
from typing import Final

__all__ = ["LASTING", "PATIENCE", "Patience", "Splice"]

_CHUNK: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Patience:
    """Seconds; ``None`` is for ever."""

    head: float = 10.0
    """For a program to say where to."""
    idle: float | None = 300.0
    """Without a byte in either direction."""
    total: float | None = 6 * 3600.0
    """Of a connection."""


PATIENCE: Final = Patience()
LASTING: Final = Patience(idle=None, total=None)
"""For as long as both sides are there."""


class Splice:
    """Two connected sockets that do not block. ``early`` has come from ``client`` already."""

    def __init__(self, client: socket.socket, server: socket.socket, patience: Patience, early: bytes = b"") -> None:
        self._loop = asyncio.get_running_loop()
        self._client = client
        self._server = server
        self._patience = patience
        self._early = early
        self.sent = 0
        """Bytes that have gone to ``server``."""
        self.received = 0
        """Bytes that have gone to ``client``."""

    async def run(self, answer: bytes = b"") -> None:
        """Pass on what comes from either side until both have ended, one fails, or it takes too long.

        ``answer`` goes to ``client`` before all else, and does not count.
        """
        try:
            for sock in (self._client, self._server):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # who sends has waited as long as it wants
            async with (
                asyncio.timeout(self._patience.total),
                asyncio.timeout(self._patience.idle) as idle,
                asyncio.TaskGroup() as both,
            ):
                both.create_task(self._send(idle))
                both.create_task(self._receive(idle, answer))
        except* OSError:
            pass

    def close(self) -> None:
        """Close both."""
        self._client.close()
        self._server.close()

    async def _send(self, idle: asyncio.Timeout) -> None:
        data = self._early or await self._loop.sock_recv(self._client, _CHUNK)
        while data:
            await self._loop.sock_sendall(self._server, data)
            self.sent += len(data)
            self._postpone(idle)
            data = await self._loop.sock_recv(self._client, _CHUNK)
        self._server.shutdown(socket.SHUT_WR)

    async def _receive(self, idle: asyncio.Timeout, answer: bytes) -> None:
        await self._loop.sock_sendall(self._client, answer)
        while data := await self._loop.sock_recv(self._server, _CHUNK):
            await self._loop.sock_sendall(self._client, data)
            self.received += len(data)
            self._postpone(idle)
        self._client.shutdown(socket.SHUT_WR)

    def _postpone(self, idle: asyncio.Timeout) -> None:
        if self._patience.idle is not None:
            idle.reschedule(self._loop.time() + self._patience.idle)
