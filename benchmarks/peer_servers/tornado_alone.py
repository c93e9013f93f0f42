"""Tornado answering in-process: ``delegates`` (as ``hayhost.bench.reference``) or ``web`` (its usual handlers)."""

import asyncio
import json
import sys

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
from tornado.web import Application, RequestHandler


def answer(org: str, body: bytes) -> bytes:
    """What the echo plugin answers."""
    return json.dumps({"org": org, "query": {}, "body": json.loads(body)}).encode()


class _Echo(HTTPMessageDelegate):
    def __init__(self, connection: HTTP1Connection) -> None:
        self._connection = connection
        self._received: list[bytes] = []

    def headers_received(self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders) -> None:
        assert isinstance(start_line, RequestStartLine)
        self._org = start_line.path.split("/")[3]

    def data_received(self, chunk: bytes) -> None:
        self._received.append(chunk)

    def finish(self) -> None:
        body = answer(self._org, b"".join(self._received))
        headers = HTTPHeaders({"Content-Type": "application/json", "Content-Length": str(len(body))})
        self._connection.write_headers(ResponseStartLine("HTTP/1.1", 200, "OK"), headers, body)
        self._connection.finish()

    def on_connection_close(self) -> None:
        pass


class _Server(HTTPServerConnectionDelegate):
    def start_request(self, server_conn: object, request_conn: object) -> HTTPMessageDelegate:
        assert isinstance(request_conn, HTTP1Connection)
        return _Echo(request_conn)


class _Handler(RequestHandler):
    def post(self, org: str) -> None:
        self.set_header("Content-Type", "application/json")
        self.write(answer(org, self.request.body))


async def main() -> None:
    """Serve until ended."""
    application = Application([(r"/plugins/echo/([^/]+)/echo", _Handler)])
    server = HTTPServer(_Server() if sys.argv[1] == "delegates" else application)
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    print(sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
