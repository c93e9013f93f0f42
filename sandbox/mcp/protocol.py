"""What the front and a worker's MCP servers say to each other: a request, what comes before its result, and the result.

Results are JSON objects as the server gave them. They are bounded, and otherwise nobody's business here.
"""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

__all__ = [
    "INTERNAL_ERROR",
    "INVALID_PARAMS",
    "INVALID_REQUEST",
    "LISTS",
    "MAX_MESSAGE",
    "METHOD_NOT_FOUND",
    "NOT_AVAILABLE",
    "TIMED_OUT",
    "Call",
    "McpError",
    "Replies",
    "encode",
    "error_of",
]

MAX_MESSAGE: Final = 16 << 20
"""Bytes in one message of a server, and in one line to the front: pictures and files fit, and many at once do."""

_MAX_WAITING: Final = 256  # notifications to a client that does not read; what comes then is dropped

INVALID_REQUEST: Final = -32600  # these four: JSON-RPC 2.0, 5.1
METHOD_NOT_FOUND: Final = -32601
INVALID_PARAMS: Final = -32602
INTERNAL_ERROR: Final = -32603
NOT_AVAILABLE: Final = -32000  # these two: as the official package has them
TIMED_OUT: Final = -32001

LISTS: Final = {
    "tools/list": "tools",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
    "prompts/list": "prompts",
}
"""The methods that list something, and the key of the result that has it."""


class McpError(Exception):
    """The answer to a request is a JSON-RPC error."""

    def __init__(self, code: int, message: str, data: Any = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data

    def json(self) -> dict[str, Any]:
        """The error object of JSON-RPC."""
        error = {"code": self.code, "message": self.message}
        return error if self.data is None else {**error, "data": self.data}


def encode(value: Any) -> bytes:
    """``value`` as JSON. Raises ``McpError`` if it is too large or is none."""
    try:
        data = msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise McpError(INTERNAL_ERROR, f"the answer is not JSON: {error}") from error
    if len(data) > MAX_MESSAGE:
        raise McpError(NOT_AVAILABLE, f"the answer is {len(data)} bytes; at most {MAX_MESSAGE} are allowed")
    return data


class Replies:
    """Requests of servers that wait for their answers from clients."""

    def __init__(self) -> None:
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[str, asyncio.Future[dict[str, Any]]]] = {}

    def expect(self, server: str) -> tuple[int, "asyncio.Future[dict[str, Any]]"]:
        """A new request of ``server``: its id, and what will be its answer."""
        id = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[id] = server, future
        future.add_done_callback(lambda _: self._waiting.pop(id, None))
        return id, future

    def give(self, server: str, message: Mapping[str, Any]) -> None:
        """Take the answer in ``message``. Raises ``McpError`` if nobody waits for it."""
        owner, future = self._waiting.get(message["reply"], ("", None)) if _is_id(message["reply"]) else ("", None)
        if future is None or owner != server or future.done():
            raise McpError(INVALID_PARAMS, f"no request {message['reply']!r} of this server waits for an answer")
        if isinstance(result := message.get("result"), dict):
            future.set_result(result)
        else:
            future.set_exception(error_of(message.get("error")))


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def error_of(value: Any) -> McpError:
    """The error that a JSON-RPC error object stands for, whatever it is."""
    value = value if isinstance(value, dict) else {}
    code, message = value.get("code"), value.get("message")
    code = code if isinstance(code, int) and not isinstance(code, bool) else INTERNAL_ERROR
    return McpError(code, message if isinstance(message, str) else "an error without a message", value.get("data"))


class Call:
    """One request to a server, for as long as it is answered.

    Servers ``tell`` it notifications and ``ask`` the client; ``answer`` is the whole as lines of JSON. Without
    ``replies`` there is no client that could hear or be asked.
    """

    def __init__(
        self, server: str, method: str, replies: Replies | None = None, progress_token: str | int | None = None
    ) -> None:
        self.server = server
        self.method = method
        self.progress_token = progress_token
        """What the client calls the request in progress notifications; ``None`` if it wants none."""
        self._replies = replies
        self._lines: deque[bytes] = deque()
        self._waiting = 0  # bytes in them
        self._more = asyncio.Event()

    def tell(self, method: str, params: Any) -> None:
        """Pass a notification on, unless too many wait already."""
        if self._replies is not None and not self._full():
            self._put({"method": method, "params": params})

    def stamped(self, params: Mapping[str, Any], token: str | int | None) -> dict[str, Any]:
        """``params`` with ``token`` as the name for progress, and with no other."""
        meta = params.get("_meta")
        meta = (
            {key: value for key, value in meta.items() if key != "progressToken"} if isinstance(meta, Mapping) else {}
        )
        if token is not None:
            meta["progressToken"] = token
        return {**{key: value for key, value in params.items() if key != "_meta"}, **({"_meta": meta} if meta else {})}

    def progress(self, params: Mapping[str, Any]) -> None:
        """Pass a progress notification on, if the client wants any, under the client's own token."""
        if self.progress_token is not None:
            self.tell("notifications/progress", {**params, "progressToken": self.progress_token})

    async def ask(self, method: str, params: Any) -> dict[str, Any]:
        """The client's answer to a request of the server's. Raises ``McpError``."""
        if self._replies is None:
            raise McpError(METHOD_NOT_FOUND, "the caller is no client that could be asked")
        id, reply = self._replies.expect(self.server)
        try:
            if self._full():
                raise McpError(NOT_AVAILABLE, "too many messages wait for the client")
            self._put({"id": id, "method": method, "params": params})
            return await reply
        finally:
            reply.cancel()

    def _full(self) -> bool:
        return len(self._lines) >= _MAX_WAITING or self._waiting > MAX_MESSAGE

    def _put(self, message: Mapping[str, Any]) -> None:
        try:
            line = encode(message) + b"\n"
        except McpError:
            return  # a notification that is not JSON or too large
        self._lines.append(line)
        self._waiting += len(line)
        self._more.set()

    async def answer(self, serve: Callable[["Call"], Awaitable[dict[str, Any]]]) -> AsyncIterator[bytes]:
        """What ``serve`` tells and asks, and at the end its result, as lines. Ends only when ``serve`` has."""
        task = asyncio.ensure_future(_outcome(serve(self)))
        task.add_done_callback(lambda _: self._more.set())
        try:
            while not task.done() or self._lines:
                while self._lines:
                    line = self._lines.popleft()
                    self._waiting -= len(line)
                    yield line
                if not task.done():
                    self._more.clear()
                    await self._more.wait()
            yield task.result()
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})


async def _outcome(result: Awaitable[dict[str, Any]]) -> bytes:
    try:
        return encode({"result": await result}) + b"\n"
    except McpError as error:
        try:
            return encode({"error": error.json()}) + b"\n"
        except McpError:  # its data is too large, or not JSON
            return encode({"error": McpError(error.code, error.message[:4096]).json()}) + b"\n"
