"""HTTP clients that do as little as they can, so that the server is what is measured.

``python -m hayhost.bench.client PORT PATH CONNECTIONS SECONDS`` is such clients in a process of their own.
"""

import contextlib
import itertools
import json
import select
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

import msgspec

from hayhost.errors import HostError

from .figures import percentile

__all__ = ["Connection", "Load", "encode_request", "load"]

_READ: Final = 256 << 10
_END: Final = b"\r\n\r\n"
_SILENCE: Final = 60.0


def encode_request(method: str, path: str, body: bytes = b"", kind: str = "application/json") -> bytes:
    """A request as it is sent."""
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: hayhost-bench\r\nAccept: */*\r\n"
    if body or method not in ("GET", "DELETE"):
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


class Load(msgspec.Struct):
    """What the clients saw: nanoseconds that each answer took, the answers' statuses, and the seconds of it all."""

    times: list[int]
    statuses: Counter[int]
    seconds: float

    @property
    def rate(self) -> float:
        """Answers per second."""
        return len(self.times) / self.seconds

    def milliseconds(self, share: float) -> float:
        """A percentile of the times."""
        return percentile(self.times, share) / 1e6


class Connection:
    """One kept connection with at most one request under way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=_SILENCE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.status = 0
        self.sent = 0
        self.body = b""
        self._answer = b""

    def send(self, request: bytes) -> None:
        self.sent = time.monotonic_ns()
        self.socket.sendall(request)

    def receive(self) -> bool:
        """Read once; whether the answer is complete, with ``status`` and ``body``. Raises ``HostError``."""
        data = self.socket.recv(_READ)
        if not data:
            raise HostError("the server closed a connection in the middle of the measurement")
        answer = self._answer = self._answer + data if self._answer else data
        head = answer.find(_END)
        if head < 0:
            return False
        lower = answer[:head].lower()
        start = head + len(_END)
        if (at := lower.find(b"\r\ncontent-length:")) >= 0:
            end = lower.find(b"\r\n", at + 2)
            complete = len(answer) - start >= int(lower[at + 17 : end if end >= 0 else head])
        elif b"\r\ntransfer-encoding: chunked" in lower:
            complete = answer.endswith(b"\r\n0\r\n\r\n")
        else:
            complete = True
        if complete:
            self.status, self.body, self._answer = int(answer[9:12]), answer[start:], b""
        return complete

    def ask(self, request: bytes) -> int:
        """Send, and wait for the answer: the nanoseconds that it took."""
        self.send(request)
        while not self.receive():
            pass
        return time.monotonic_ns() - self.sent

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def _connected(port: int, count: int) -> Iterator[list[Connection]]:
    connections = [Connection(port) for _ in range(count)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def load(port: int, requests: Sequence[bytes], connections: int, seconds: float) -> Load:
    """Have ``connections`` clients ask without a pause for ``seconds``, with ``requests`` in turn.

    Raises ``HostError`` if the server does not answer.
    """
    times: list[int] = []
    statuses: Counter[int] = Counter()
    with _connected(port, connections) as clients, select.epoll() as poll:
        of = {client.socket.fileno(): client for client in clients}
        for descriptor in of:
            poll.register(descriptor, select.EPOLLIN)
        turn = itertools.cycle(requests)
        clock = time.monotonic_ns
        begun = clock()
        end = begun + int(seconds * 1e9)
        for client in clients:
            client.send(next(turn))
        busy = connections
        while busy:
            ready = poll.poll(_SILENCE)
            if not ready:
                raise HostError(f"the server did not answer for {_SILENCE:g} s")
            for descriptor, _ in ready:
                client = of[descriptor]
                if not client.receive():
                    continue
                now = clock()
                times.append(now - client.sent)
                statuses[client.status] += 1
                if now < end:
                    client.send(next(turn))
                else:
                    busy -= 1
        return Load(times, statuses, (clock() - begun) / 1e9)


def main() -> None:
    """Be the clients, from the line ``running`` on; a report in JSON is the last line."""
    port, path, connections, seconds = sys.argv[1:5]
    request = encode_request("POST", path, b'{"id":1}')
    print("running", flush=True)
    done = load(int(port), [request], int(connections), float(seconds))
    report = {
        "requests": len(done.times),
        "statuses": done.statuses,
        "rate": done.rate,
        "p50": done.milliseconds(0.5),
        "p99": done.milliseconds(0.99),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
