"""The worker's end of its socket: frames out in batches, frames in as calls."""

import asyncio
import os
import socket
import threading
from collections.abc import Callable

from . import wire

__all__ = ["Link"]

# While the front does not read, records beyond this many waiting bytes are dropped rather than kept.
_LOG_BACKLOG = 256 << 10
# Not more, or each read maps and unmaps memory of its own.
_READ = 64 << 10


class Link:
    """Sends and receives frames on a non-blocking socket, within an event loop. Losing the front ends the process."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._loop = loop
        self._decoder: wire.Decoder[wire.ToWorker] = wire.Decoder(wire.ToWorker)
        self._lock = threading.Lock()
        self._out: list[bytes] = []
        self._waiting = 0  # bytes in _out that the socket did not take
        self._flushing = False
        self._writer_added = False

    def listen(self, receive: Callable[[wire.ToWorker], None]) -> None:
        """Call ``receive`` with every message that arrives."""
        feed = self._decoder.feed
        recv = self._sock.recv

        def readable() -> None:
            try:
                data = recv(_READ)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                os._exit(0)  # the front is gone; nobody is left to serve
            for message in feed(data):
                receive(message)

        self._loop.add_reader(self._sock, readable)

    def send(self, message: wire.Message, *, now: bool = False) -> None:
        """Queue a frame; all frames of one turn of the loop leave in one write. On the loop's thread only.

        ``now``, if it is likely to be the only one, saves a turn.
        """
        frame = wire.encode(message)
        with self._lock:
            self._out.append(frame)
        if now and not self._writer_added:
            self.flush()
        elif not self._flushing:
            self._flushing = True
            self._loop.call_soon(self.flush)

    def send_now(self, message: wire.Message) -> bool:
        """Send a log record from any thread, at once, so that it is out even if the process dies next.

        ``False`` if it is left out, because too many wait already.
        """
        frame = wire.encode(message)
        with self._lock:
            if self._waiting > _LOG_BACKLOG:
                return False
            self._out.append(frame)
            self._write()
            blocked = self._waiting and not self._writer_added
        if blocked:
            self._loop.call_soon_threadsafe(self.flush)
        return True

    def flush(self) -> None:
        """Write what is queued; the rest follows when the socket takes it."""
        self._flushing = False
        with self._lock:
            self._write()
            waiting = self._waiting
        if waiting and not self._writer_added:
            self._writer_added = True
            self._loop.add_writer(self._sock, self.flush)
        elif not waiting and self._writer_added:
            self._writer_added = False
            self._loop.remove_writer(self._sock)

    def _write(self) -> None:
        if not self._out:
            return
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        try:
            sent = self._sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            os._exit(0)
        self._out[:] = [data[sent:]] if sent < len(data) else []
        self._waiting = len(data) - sent

    def close(self, seconds: float) -> None:
        """Write everything that is queued, waiting at most ``seconds`` for a front that does not read."""
        with self._lock:
            self._sock.settimeout(seconds)
            try:
                self._sock.sendall(b"".join(self._out))
            except OSError:
                pass
