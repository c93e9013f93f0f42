"""A request to an MCP server, on its way through an org's slot to its worker and back."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from hayhost.errors import RequestError, WorkerLostError
from hayhost.slot import Slot
from hayhost.worker import Worker
from sandbox import wire

__all__ = ["MAX_LINE", "Call", "ServerError"]

MAX_LINE: Final = 16 << 20
"""Bytes in one message of a server."""

_SLACK: Final = 64 << 10  # a line has a little around the message


class ServerError(Exception):
    """An MCP server answered with a JSON-RPC error, or the host does in its place."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


class Call:
    """One request to an MCP server: a waiter of its slot, then a stream of the worker.

    Iterate over it for what the server says before its answer, one JSON object each; then ``result`` is there. Leave it
    with ``close``, however it went.
    """

    trace = None

    def __init__(self, request: dict[str, Any], id: str) -> None:
        self.worker: Worker | None = None
        self.result: dict[str, Any] | None = None
        self._body = memoryview(msgspec.json.encode(request))
        self._id = id
        self._slot: Slot | None = None
        self._stream = 0
        self._window = 0
        self._headed = False
        self._ended = False
        self._error: Exception | None = None
        self._line = bytearray()
        self._lines: deque[tuple[bytes, int]] = deque()  # with the bytes that are granted when it is taken
        self._outstanding = 0
        self._news: asyncio.Future[None] | None = None

    def submit(self, slot: Slot) -> None:
        """Have ``slot`` give it the org's worker, which is started if there is none."""
        self._slot = slot
        slot.submit(self)

    def close(self) -> None:
        """Nobody waits for it any more."""
        if self._ended:
            return
        self._ended = True
        if self.worker is not None:
            self.worker.cancel(self._stream)
        elif self._slot is not None:
            self._slot.forget(self)

    # ---- for the slot

    def begin(self, worker: Worker) -> None:
        self.worker = worker
        whole = len(self._body) <= wire.CHUNK
        body = bytes(self._body) if whole else b""
        headers = [("content-type", "application/json")]
        self._stream = worker.open(
            self, lambda id: wire.Request(id, wire.MCP, "POST", "/mcp", "", [], headers, self._id, body, whole)
        )
        if whole:
            self._body = self._body[:0]
        else:
            self._window = wire.WINDOW
            self._send()

    def failed(self, error: RequestError) -> None:
        self._end(error)

    # ---- for the worker

    def head(self, message: wire.ResponseHead) -> None:
        if self._headed:
            self._misbehaved("an answer with two heads")
            return
        self._headed = True
        if message.status != 200:
            self._end(WorkerLostError("The worker did not take the request"), cancel=not message.end)
        elif self._take(message.body) and message.end:
            self._end(None)

    def body(self, message: wire.Body) -> None:
        if not self._headed:
            self._misbehaved("an answer without a head")
        elif self._take(message.data) and message.end:
            self._end(None)

    def credit(self, size: int) -> None:
        self._window += size
        if self._window > wire.WINDOW:
            self._misbehaved("more room than there was")
        else:
            self._send()

    def _send(self) -> None:
        assert self.worker is not None
        while self._body and self._window > 0:
            chunk, self._body = self._body[: wire.CHUNK], self._body[wire.CHUNK :]
            self._window -= len(chunk)
            self.worker.send(wire.Body(self._stream, bytes(chunk), not self._body))

    def _take(self, data: bytes) -> bool:
        """Take in a piece of the answer; whether that was allowed."""
        self._outstanding += len(data)
        if self._outstanding > wire.WINDOW:
            self._misbehaved("more of an answer than was granted")
            return False
        *whole, rest = data.split(b"\n")
        for line in whole:
            self._line += line
            self._lines.append((bytes(self._line), len(line) + 1))
            self._line.clear()
        self._line += rest
        if len(self._line) > MAX_LINE + _SLACK:
            self._end(ServerError(-32000, f"The answer is larger than {MAX_LINE} bytes"), cancel=True)
            return False
        self._grant(len(rest))  # or a long line would never be whole
        if whole:
            self._wake()
        return True

    def _grant(self, size: int) -> None:
        self._outstanding -= size
        if size and self.worker is not None and not self._ended:
            self.worker.send(wire.Window(self._stream, size))

    def _misbehaved(self, how: str) -> None:
        worker = self.worker
        self._end(WorkerLostError("The plugin broke off its answer"))
        if worker is not None:
            worker.misbehaved(how)

    def _end(self, error: Exception | None, *, cancel: bool = False) -> None:
        if cancel:
            self.close()
        self._ended = True
        self._error = self._error or error
        self._wake()

    def _wake(self) -> None:
        if self._news is not None and not self._news.done():
            self._news.set_result(None)

    # ---- for whoever asked

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """What comes before the answer. Raises ``RequestError`` if there is none, ``ServerError`` if it is an error."""
        while True:
            while self._lines:
                line, size = self._lines.popleft()
                self._grant(size)
                if (message := self._message(line)) is not None:
                    yield message
            if self._ended:
                break
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        if self._error is not None:
            raise self._error
        if self.result is None:
            raise ServerError(-32603, "The server's answer has no end")

    def _message(self, line: bytes) -> dict[str, Any] | None:
        """What a line says, unless it is the answer, which is kept."""
        try:
            message = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            message = None
        if not isinstance(message, dict) or self.result is not None or self._error is not None:
            raise ServerError(-32603, "The server's answer is malformed")
        if isinstance(message.get("method"), str):
            return message
        if isinstance(message.get("result"), dict):
            self.result = message["result"]
        elif isinstance(error := message.get("error"), dict):
            code, text = error.get("code"), error.get("message")
            code = code if isinstance(code, int) and not isinstance(code, bool) and abs(code) < 1 << 31 else -32603
            text = text[:10_000] if isinstance(text, str) else "The server failed"
            self._error = self._error or ServerError(code, text, error.get("data"))
        else:
            raise ServerError(-32603, "The server's answer is malformed")
        return None
