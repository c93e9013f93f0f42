"""Writes lines to where they go. Nobody who logs waits for that, and a reader that is not there stops nobody."""

import os
import select
import stat
import threading
from collections import deque
from collections.abc import Callable
from typing import Final, TextIO

__all__ = ["Writer", "to_stream"]

# Lines that wait for a reader that is behind: what a busy host logs in some seconds.
_MOST: Final = 4 << 20
_BATCH: Final = 64 << 10


class Writer:
    """Hands lines to ``write`` on a thread of its own.

    While ``write`` takes none, some megabytes wait and the rest is dropped; then ``missing(count)`` is a line that
    says so, in their place.
    """

    def __init__(self, write: Callable[[bytes], None], missing: Callable[[int], bytes], name: str) -> None:
        self._write = write
        self._missing = missing
        self._name = name
        self._thread: threading.Thread | None = None
        self._condition = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0

    def put(self, line: bytes) -> None:
        """Have ``line`` written; in which order, is the order of calls."""
        with self._condition:
            if self._size > (_MOST // 2 if self._dropped else _MOST):
                self._dropped += 1
                return
            if self._dropped:
                self._tell_dropped()
            self._append(line)
            if self._thread is None:
                self._start()
            self._condition.notify_all()

    def _tell_dropped(self) -> None:
        count, self._dropped = self._dropped, 0
        self._append(self._missing(count))

    def _append(self, line: bytes) -> None:
        self._lines.append(line)
        self._size += len(line)

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is ending
            self._write(b"".join(self._lines))
            self._lines.clear()
            self._size = 0
        else:
            self._thread = thread

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._lines:
                    if self._dropped:  # and nobody has said anything since
                        self._tell_dropped()
                    else:
                        self._condition.wait()
                batch: list[bytes] = []
                size = 0
                while self._lines and size < _BATCH:
                    batch.append(self._lines.popleft())
                    size += len(batch[-1])
            self._write(b"".join(batch))
            with self._condition:
                self._size -= size
                self._condition.notify_all()

    def flush(self, seconds: float) -> bool:
        """Wait until everything is written, but not for longer than ``seconds``; whether it is."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._size, seconds)


def to_stream(stream: TextIO, missing: Callable[[int], bytes]) -> tuple[Callable[[bytes], None], Writer | None]:
    """What writes a line to ``stream``, and the writer that does so if it may have to wait.

    A regular file, or what is none at all, has no reader that could be behind.
    """
    try:
        descriptor = stream.fileno()
        waits = not stat.S_ISREG(os.fstat(descriptor).st_mode)
    except (OSError, ValueError):

        def write(line: bytes) -> None:
            try:
                stream.write(line.decode())
                stream.flush()
            except (OSError, ValueError):
                pass

        return write, None

    def write_all(data: bytes) -> None:
        # Not through the stream: its lock would be held while we wait, and the interpreter needs it to end.
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(descriptor, view) :]
            except BlockingIOError:  # somebody else who has the pipe made it so
                poll = select.poll()
                poll.register(descriptor, select.POLLOUT)
                poll.poll()
            except OSError:
                return  # that nobody reads it any more stops no host

    if not waits:
        return write_all, None
    writer = Writer(write_all, missing, "log")
    return writer.put, writer
