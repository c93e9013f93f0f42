"""One multiprocess process per org, spawned when it is first asked for, with a pipe; Tornado delegates in front.

Requests go down the pipe pickled and with a number, and answers come back by it, as one would write it in an afternoon.
"""

import asyncio
import json
import signal
from typing import Any

import multiprocess
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


def work(org: str, pipe: Any) -> None:
    """Be an org's worker."""
    while True:
        try:
            number, _method, _path, body = pipe.recv()
        except EOFError:
            return
        pipe.send((number, 200, json.dumps({"org": org, "query": {}, "body": json.loads(body)}).encode()))


class _Worker:
    def __init__(self, org: str) -> None:
        context = multiprocess.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(org, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._waiting: dict[int, _Request] = {}
        self._number = 0
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._answers)

    def ask(self, request: "_Request", method: str, path: str, body: bytes) -> None:
        self._number += 1
        self._waiting[self._number] = request
        self._pipe.send((self._number, method, path, body))

    def _answers(self) -> None:
        while self._pipe.poll():
            number, status, body = self._pipe.recv()
            self._waiting.pop(number).answer(status, body)


WORKERS: dict[str, _Worker] = {}


class _Request(HTTPMessageDelegate):
    def __init__(self, connection: HTTP1Connection) -> None:
        self._connection = connection
        self._received: list[bytes] = []

    def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        assert isinstance(start_line, RequestStartLine)
        self._line = start_line

    def data_received(self, chunk: bytes) -> None:
        self._received.append(chunk)

    def finish(self) -> None:
        org = self._line.path.split("/")[3]
        worker = WORKERS.get(org) or WORKERS.setdefault(org, _Worker(org))
        worker.ask(self, self._line.method, self._line.path, b"".join(self._received))

    def answer(self, status: int, body: bytes) -> None:
        headers = HTTPHeaders({"Content-Type": "application/json", "Content-Length": str(len(body))})
        self._connection.write_headers(ResponseStartLine("HTTP/1.1", status, "OK"), headers, body)
        self._connection.finish()

    def on_connection_close(self) -> None:
        pass


class _Server(HTTPServerConnectionDelegate):
    def start_request(self, server_conn: object, request_conn: object) -> HTTPMessageDelegate:
        assert isinstance(request_conn, HTTP1Connection)
        return _Request(request_conn)


async def main() -> None:
    """Serve until ended."""
    sockets = bind_sockets(0, "127.0.0.1")
    HTTPServer(_Server()).add_sockets(sockets)
    print(sockets[0].getsockname()[1], flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    for worker in WORKERS.values():
        worker.process.kill()


if __name__ == "__main__":
    asyncio.run(main())
