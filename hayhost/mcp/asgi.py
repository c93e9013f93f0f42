"""One HTTP request for an ASGI application, on the front's own connections."""

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from hayhost.exchange import Exchange
from hayhost.logs import get_logger
from sandbox import wire

__all__ = ["App", "Bridge"]

Message = MutableMapping[str, Any]
App = Callable[
    [MutableMapping[str, Any], Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]
]

_ASGI: Final = {"version": "3.0", "spec_version": "2.4"}


class Bridge:
    """Stands where a worker stands for other requests: what the application sends is the exchange's answer, no faster
    than the client takes it."""

    def __init__(self, exchange: Exchange, body: bytes) -> None:
        self.status = 0
        self.left = asyncio.Event()
        """Set when nobody waits for the answer any more."""
        self._exchange = exchange
        self._body: bytes | None = body
        self._room = wire.WINDOW
        self._more_room = asyncio.Event()
        self._over = asyncio.Event()
        self._ended = False
        exchange.answered_by(self)

    @property
    def scope(self) -> dict[str, Any]:
        """The request as ASGI has it."""
        exchange = self._exchange
        return {
            "type": "http",
            "asgi": _ASGI,
            "http_version": "1.1",
            "method": exchange.method,
            "scheme": "http",
            "path": exchange.path,
            "raw_path": exchange.path.encode("latin-1", "replace"),
            "root_path": "",
            "query_string": exchange.query.encode("latin-1", "replace"),
            "headers": [
                (name.lower().encode("latin-1"), value.encode("latin-1", "replace"))
                for name, value in exchange.headers.get_all()
            ],
            "client": None,
            "server": None,
        }

    def end(self) -> None:
        """Have the application end an answer that would go on for ever."""
        self._over.set()

    def finish(self) -> None:
        """The application is done: complete what it left open. Raises ``RuntimeError`` if it has not answered."""
        if self._ended or self.left.is_set():
            return
        if not self.status:
            raise RuntimeError("there is no answer")
        self._ended = True
        self._exchange.body(wire.Body(0, b"", True))

    async def receive(self) -> Message:
        """The request's body, and then that the client has left."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def answer(self, message: Message) -> None:
        """Answer. What comes after the client has left, or after the end, is dropped."""
        if self._ended or self.left.is_set():
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in message.get("headers", ())]
            self._exchange.head(wire.ResponseHead(0, self.status, headers, b"", False))
            return
        data = memoryview(message.get("body", b""))
        while data:
            while self._room <= 0 and not self.left.is_set():
                self._more_room.clear()
                await self._more_room.wait()
            if self.left.is_set():
                return
            chunk, data = data[: min(self._room, wire.CHUNK)], data[min(self._room, wire.CHUNK) :]
            self._room -= len(chunk)
            self._exchange.body(wire.Body(0, bytes(chunk), False))
        if not message.get("more_body", False):
            self._ended = True
            self._exchange.body(wire.Body(0, b"", True))

    # ---- for the exchange, to which this is the worker

    def send(self, message: wire.Body | wire.Window) -> None:
        """The client has taken some of the answer."""
        if isinstance(message, wire.Window):
            self._room += message.size
            self._more_room.set()

    def cancel(self, id: int) -> None:
        """Nobody waits for the answer any more."""
        self.left.set()
        self._over.set()
        self._more_room.set()

    def misbehaved(self, how: str) -> None:
        """The application did not keep to HTTP, which is a bug of the host's."""
        get_logger().error("an internal error", reason=f"MCP: {how}", path=self._exchange.path)
