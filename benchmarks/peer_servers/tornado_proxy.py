"""A Tornado proxy in front of one uvicorn process per org."""

import asyncio
import signal

from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from .workers import Workers

WORKERS = Workers()


class _Proxy(RequestHandler):
    async def post(self, org: str, path: str) -> None:
        port = await WORKERS.port(org)
        headers = {"Content-Type": self.request.headers.get("Content-Type", "application/octet-stream")}
        request = HTTPRequest(f"http://127.0.0.1:{port}/{path}", "POST", headers, self.request.body)
        answer = await AsyncHTTPClient().fetch(request, raise_error=False)
        self.set_status(answer.code)
        self.set_header("Content-Type", answer.headers.get("Content-Type", ""))
        self.write(answer.body)


async def main() -> None:
    """Serve until ended."""
    AsyncHTTPClient.configure(None, max_clients=1000)
    server = HTTPServer(Application([(r"/plugins/echo/([^/]+)/(.*)", _Proxy)]))
    sockets = bind_sockets(0, "127.0.0.1")
    server.add_sockets(sockets)
    print(sockets[0].getsockname()[1], flush=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    WORKERS.end()


if __name__ == "__main__":
    asyncio.run(main())
