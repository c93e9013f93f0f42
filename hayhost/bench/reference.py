"""A yardstick: Tornado's own HTTP server, answering every request in-process with the same few bytes.

``python -m hayhost.bench.reference`` reads the body of its answers from standard input and prints its port. Nothing in
it is hayhost's, so what a host does less than it is what the host costs.
"""

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from email.utils import formatdate

from tornado.http1connection import HTTP1Connection
from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.netutil import bind_sockets

from hayhost.errors import HostError

__all__ = ["reference"]


class _Answering(HTTPMessageDelegate):
    def __init__(self, connection: HTTP1Connection, body: bytes) -> None:
        self._connection = connection
        self._body = body
        self._received: list[bytes] = []

    def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        pass

    def data_received(self, chunk: bytes) -> None:
        self._received.append(chunk)

    def finish(self) -> None:
        headers = HTTPHeaders()
        headers["Content-Type"] = "application/json"
        headers["Content-Length"] = str(len(self._body))
        headers["Date"] = formatdate(usegmt=True)
        self._connection.write_headers(ResponseStartLine("HTTP/1.1", 200, "OK"), headers, self._body)
        self._connection.finish()

    def on_connection_close(self) -> None:
        pass


class _Server(HTTPServerConnectionDelegate):
    def __init__(self, body: bytes) -> None:
        self._body = body

    def start_request(self, server_conn: object, request_conn: object) -> HTTPMessageDelegate:
        assert isinstance(request_conn, HTTP1Connection)
        return _Answering(request_conn, self._body)


@contextlib.contextmanager
def reference(body: bytes, module: str = __name__) -> Iterator[int]:
    """Run it, answering with ``body``, until the end of the block: its port."""
    command = [sys.executable, "-m", module]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdin
        assert process.stdout
        process.stdin.write(body)
        process.stdin.close()
        if not (line := process.stdout.readline()):
            raise HostError("the server to compare with did not start")
        yield int(line)
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


async def _serve(body: bytes) -> None:
    sockets = bind_sockets(0, "127.0.0.1")
    server = HTTPServer(_Server(body))
    server.add_sockets(sockets)
    print(sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve(sys.stdin.buffer.read()))
