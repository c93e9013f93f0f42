"""The front's end of a child's socket. What arrives on it is a stranger's until it is decoded and judged."""

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from sandbox import wire

__all__ = ["Channel", "Exits", "socket_pair"]

# One read's worth per turn of the loop and child: a child that floods gets its share, not more.
_READ = 128 << 10
# At least what a socket can hold; one that goes on writing while it is drained is not listened to for ever.
_DRAIN_READS = 8
# Joined and copied at once at most, so that a long backlog is not copied again for every piece that leaves.
_WRITE = 256 << 10
_EXITS = 64
_CREDENTIALS = struct.Struct("3i")  # struct ucred, unix(7)


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """The front's end, which learns from the kernel who sends, and the child's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    ours.setblocking(False)
    return ours, theirs


def _nobody(*_: Any) -> None:
    """Nobody is told any more."""


class Exits:
    """How the last children of a process ended, as it says: pid to exit code, or minus a signal."""

    def __init__(self) -> None:
        self._status: dict[int, int] = {}

    def add(self, message: wire.ChildExited) -> None:
        """One more has ended."""
        self._status[message.pid] = message.status
        while len(self._status) > _EXITS:
            self._status.pop(next(iter(self._status)))

    def get(self, pid: int) -> int | None:
        """How child ``pid`` ended; ``None`` if that is not known."""
        return self._status.get(pid)


class Channel:
    """Frames to and from one child.

    The first thing a child sends is a ``Hello``; ``hello(pid, message)`` hears of it with the pid that the kernel
    vouches for. Everything after it goes to ``receive``. ``closed(reason)`` is called once, when the child is gone or
    sent what is not a frame.
    """

    def __init__(
        self,
        sock: socket.socket,
        messages: Any,
        *,
        hello: Callable[[int, wire.Hello], None],
        receive: Callable[[Any], None],
        closed: Callable[[str], None],
    ) -> None:
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._decoder: wire.Decoder[Any] = wire.Decoder(messages)
        self._hello = hello
        self._receive = receive
        self._closed = closed
        self._out: deque[tuple[bytes, Sequence[int]]] = deque()
        self._scheduled = False
        self._writer_added = False
        self.is_closed = False
        self._loop.add_reader(sock, self._read_hello)

    def send(self, message: wire.Message, descriptors: Sequence[int] = (), *, now: bool = False) -> None:
        """Queue a frame; frames of one turn of the loop leave together. ``descriptors`` are closed once sent.

        ``now``, if it is likely to be the only one, saves a turn.
        """
        if self.is_closed:
            for descriptor in descriptors:
                os.close(descriptor)
            return
        self._out.append((wire.encode(message), descriptors))
        if now and not self._writer_added:
            self._flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._scheduled = False
        if self.is_closed:
            return
        try:
            while self._out:
                if self._out[0][1]:
                    data, descriptors = self._out[0]
                    sent = socket.send_fds(self._sock, [data], list(descriptors))
                    for descriptor in descriptors:
                        os.close(descriptor)
                    self._out[0] = (data, ())
                else:
                    parts: list[bytes] = []
                    size = 0
                    while self._out and not self._out[0][1] and size < _WRITE:
                        parts.append(self._out.popleft()[0])
                        size += len(parts[-1])
                    data = parts[0] if len(parts) == 1 else b"".join(parts)
                    self._out.appendleft((data, ()))
                    sent = self._sock.send(data)
                if sent < len(data):
                    self._out[0] = (data[sent:], ())
                else:
                    self._out.popleft()
        except BlockingIOError:
            pass
        except OSError as error:
            self._forget()  # the child reads no more; what it still said counts all the same
            self._loop.call_soon(self._lost, error.strerror or "the socket failed")
        if bool(self._out) != self._writer_added:
            self._writer_added = bool(self._out)
            if self._writer_added:
                self._loop.add_writer(self._sock, self._flush)
            else:
                self._loop.remove_writer(self._sock)

    def _read_hello(self) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(_READ, socket.CMSG_SPACE(_CREDENTIALS.size))
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error.strerror or "the socket failed")
            return
        if not data:
            self._end("it ended before it said hello")
            return
        pid: int | None = 0
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_CREDENTIALS:
                pid = _CREDENTIALS.unpack(content[: _CREDENTIALS.size])[0]
        try:
            for message in self._decoder.feed(data):
                if pid is None:
                    self._receive(message)
                elif isinstance(message, wire.Hello) and message.version == wire.VERSION:
                    self._greet(pid, message)
                    pid = None  # said once
                elif isinstance(message, wire.Hello):
                    raise wire.ProtocolError(
                        f"it speaks version {message.version} of the protocol, not {wire.VERSION}; restart the host"
                    )
                elif isinstance(message, wire.Failed | wire.LoadFailed):
                    self._receive(message)
                else:
                    raise wire.ProtocolError("its first frame is not a Hello")
                if self.is_closed:
                    return
        except wire.ProtocolError as error:
            self._end(f"protocol error: {error}")

    def _greet(self, pid: int, message: wire.Hello) -> None:
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 0)
        self._loop.remove_reader(self._sock)
        self._loop.add_reader(self._sock, self._read)
        self._hello(pid, message)

    def _read(self) -> None:
        try:
            data = self._sock.recv(_READ)
        except BlockingIOError:
            return
        except OSError as error:
            self._end(error.strerror or "the socket failed")
            return
        if not data:
            self._end("")
            return
        try:
            for message in self._decoder.feed(data):
                self._receive(message)
                if self.is_closed:
                    return
        except wire.ProtocolError as error:
            self._end(f"protocol error: {error}")

    def drain(self) -> None:
        """Take in what the child still said before it died. Not within ``receive``, whose frame is unfinished."""
        for _ in range(_DRAIN_READS):
            try:
                data = b"" if self.is_closed else self._sock.recv(_READ)
            except OSError:
                return
            if not data:
                return
            try:
                for message in self._decoder.feed(data):
                    self._receive(message)
                    if self.is_closed:
                        return
            except wire.ProtocolError:
                return

    def _lost(self, reason: str) -> None:
        self.drain()
        self._end(reason)

    def _end(self, reason: str) -> None:
        if not self.is_closed:
            closed = self._closed
            self.close()
            closed(reason)

    def close(self) -> None:
        """Close the socket, which tells the child to end. Closing twice is safe."""
        if self.is_closed:
            return
        self.is_closed = True
        self._loop.remove_reader(self._sock)
        if self._writer_added:
            self._loop.remove_writer(self._sock)
        self._sock.close()
        self._forget()
        # They lead back to its owner, and so to itself: what has ended shall leave memory at once.
        self._hello = self._receive = self._closed = _nobody

    def _forget(self) -> None:
        for _, descriptors in self._out:
            for descriptor in descriptors:
                os.close(descriptor)
        self._out.clear()
