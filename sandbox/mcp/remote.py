"""A server behind a connection: connected, initialized, asked, and connected anew when it is lost.

The official package's dispatcher matches answers to requests. Results stay as they came: nothing checks them against
the package's models, by which one odd tool would cost the whole list.
"""

import asyncio
import contextlib
import itertools
from abc import abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import anyio
from mcp.client._transport import ReadStream, TransportStreams, WriteStream
from mcp.shared.dispatcher import CallOptions, DispatchContext
from mcp.shared.exceptions import MCPError
from mcp.shared.inbound import (
    MCP_METHOD_HEADER,
    MCP_NAME_HEADER,
    MCP_PROTOCOL_VERSION_HEADER,
    NAME_BEARING_METHODS,
    encode_header_value,
)
from mcp.shared.jsonrpc_dispatcher import JSONRPCDispatcher
from mcp.shared.message import SessionMessage
from mcp.shared.transport_context import TransportContext
from mcp_types import (
    CLIENT_CAPABILITIES_META_KEY,
    CLIENT_INFO_META_KEY,
    METHOD_NOT_FOUND,
    PROTOCOL_VERSION_META_KEY,
)
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, MODERN_PROTOCOL_VERSIONS

from .protocol import NOT_AVAILABLE, TIMED_OUT, Call, McpError
from .server import INITIALIZE, Failed, Notice, Server, info_of, pages, usable

__all__ = ["RemoteServer", "ServerLostError"]

_START_TIMEOUT: Final = 30.0
_PING_TIMEOUT: Final = 5.0
_FIRST_PAUSE: Final = 0.5
_LAST_PAUSE: Final = 60.0
_STEADY: Final = 60.0  # who has run for so many seconds begins with the first pause again
_CANNOT_BE_CANCELLED: Final[CallOptions] = {"cancel_on_abandon": False}
_MODERN: Final = MODERN_PROTOCOL_VERSIONS[-1]


class ServerLostError(Exception):
    """The connection to the server has ended, or cannot be made."""


class RemoteServer(Server):
    """``notice`` hears what the server says apart from any request."""

    def __init__(
        self, id: str, timeout: float | None, changed: Callable[[], None], failed: Failed, notice: Notice
    ) -> None:
        super().__init__(id, changed, failed)
        self.timeout = timeout
        self._notice = notice
        self._dispatcher: JSONRPCDispatcher[TransportContext] | None = None
        self._running = asyncio.Event()
        self._version = ""
        self._capabilities: Mapping[str, Any] = {}
        self._lists: dict[str, list[dict[str, Any]]] = {}
        self._calls: dict[str, Call] = {}
        """The calls under way, by the name under which the server reports progress."""
        self._tokens = itertools.count(1)
        self._keeping: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._session: asyncio.Task[None] | None = None
        self._stopping = False
        self.why = ""
        """Why the last connection has ended, if it is known."""

    @abstractmethod
    def connect(self) -> AbstractAsyncContextManager[TransportStreams]:
        """A new connection. Entering it raises what keeps it from being made."""

    # ---- its life

    async def start(self) -> None:
        """Connect and initialize, and keep it so from then on. Raises what the first attempt raises."""
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._keeping = asyncio.create_task(self._keep(begun))
        try:
            await begun
        except BaseException:
            await self.stop()
            raise

    async def _keep(self, begun: "asyncio.Future[None]") -> None:
        loop = asyncio.get_running_loop()
        pause = _FIRST_PAUSE
        while True:
            since = loop.time()
            self._session = asyncio.create_task(self._live(begun))
            await asyncio.wait({self._session})
            if self._stopping:
                return
            error = None if self._session.cancelled() else self._session.exception()
            error = error or ServerLostError(self.why or "the connection ended")
            if not begun.done():
                begun.set_exception(error)
                return
            self._failed(f"MCP server {self.id!r} is lost and started anew", error)
            self.to("restarting", str(error) or type(error).__name__)
            pause = _FIRST_PAUSE if loop.time() - since > _STEADY else pause
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LAST_PAUSE)

    async def _live(self, begun: "asyncio.Future[None]") -> None:
        """One connection from its beginning to its end."""
        self.why = ""
        try:
            async with self.connect() as (read, write):
                try:
                    await self._converse(read, write, begun)
                finally:  # and not only when the connection is cleared away
                    self._dispatcher = None
                    self._running.clear()
        except BaseExceptionGroup as errors:
            error = _first(errors)
            if isinstance(error, MCPError):
                why = f"{self.why}: " if self.why else ""
                raise ServerLostError(f"{why}{error.message[:300]}") from None
            raise error from None

    async def _converse(
        self,
        read: ReadStream[SessionMessage | Exception],
        write: WriteStream[SessionMessage],
        begun: "asyncio.Future[None]",
    ) -> None:
        """Initialize, and answer and ask until the streams end."""
        async with anyio.create_task_group() as group:
            dispatcher = JSONRPCDispatcher(read, write)
            await group.start(dispatcher.run, self._on_request, self._on_notify, self._hear)
            seconds = _START_TIMEOUT if self.timeout is None else self.timeout
            try:
                async with asyncio.timeout(seconds):
                    await self._initialize(dispatcher)
            except TimeoutError:
                raise TimeoutError(f"MCP server {self.id!r} did not initialize within {seconds:g} s") from None
            self._dispatcher = dispatcher
            self._running.set()
            self._lists.clear()
            self.changes += 1
            self.to("running")
            if not begun.done():
                begun.set_result(None)

    async def _initialize(self, dispatcher: JSONRPCDispatcher[TransportContext]) -> None:
        try:
            result = await dispatcher.send_raw_request("initialize", INITIALIZE, _CANNOT_BE_CANCELLED)
        except MCPError as refused:
            try:
                result = await self._discover(dispatcher)
            except MCPError:
                raise refused from None
        else:
            version = result.get("protocolVersion")
            if version not in HANDSHAKE_PROTOCOL_VERSIONS:
                raise ServerLostError(f"MCP server {self.id!r} speaks the unknown protocol version {version!r:.100}")
            self._version = version
            await dispatcher.notify("notifications/initialized", None, self._options("notifications/initialized", {}))
        capabilities = result.get("capabilities")
        self._capabilities = capabilities if isinstance(capabilities, Mapping) else {}
        self.info = info_of(result, [self._version], self.timeout)

    async def _discover(self, dispatcher: JSONRPCDispatcher[TransportContext]) -> dict[str, Any]:
        """Begin without a handshake, for servers that know only that (2026-07-28)."""
        self._version = _MODERN
        params = self._enveloped({})
        options = self._options("server/discover", params)
        return await dispatcher.send_raw_request("server/discover", params, {**options, **_CANNOT_BE_CANCELLED})

    async def stop(self) -> None:
        self._stopping = True
        for task in (self._checking, self._session, self._keeping):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})

    # ---- what it says of itself

    def _hear(self, method: str, params: Mapping[str, Any] | None) -> bool:
        """Take a notification, in the order in which they and the answers came."""
        params = params or {}
        if method == "notifications/progress":
            call = self._calls.get(str(params.get("progressToken")))
            if call is not None:
                call.progress(params)
        elif method.endswith("/list_changed"):
            self._lists.clear()
            self.list_changed()
        elif method == "notifications/message" and len(self._calls) == 1:
            next(iter(self._calls.values())).tell(method, params)
        elif method != "notifications/cancelled":
            self._notice(self.id, method, params)
        return True

    async def _on_notify(
        self, _context: DispatchContext[TransportContext], _method: str, _params: Mapping[str, Any] | None
    ) -> None:
        """All has been heard."""

    async def _on_request(
        self, _context: DispatchContext[TransportContext], method: str, params: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if method == "ping":
            return {}
        if method not in ("sampling/createMessage", "elicitation/create"):
            raise MCPError(METHOD_NOT_FOUND, "Method not found", method)
        if len(self._calls) != 1:  # nothing in the request says for which one it is
            raise MCPError(
                NOT_AVAILABLE, f"{len(self._calls)} requests are under way: whose client is meant is not known"
            )
        try:
            return await next(iter(self._calls.values())).ask(method, params or {})
        except McpError as error:
            raise MCPError(error.code, error.message, error.data) from None

    # ---- what it is asked

    async def list(self, method: str) -> list[dict[str, Any]]:
        await self._wait_until_running()
        if method == "tools/list" and "tools" not in self._capabilities:
            return []
        if (known := self._lists.get(method)) is not None:
            return known
        changes = self.changes
        call = Call(self.id, method)
        found = usable(self.id, method, await pages(method, lambda params: self._ask(call, params)), self._failed)
        if changes == self.changes and self._version != _MODERN:  # no word of changes without a handshake
            self._lists[method] = found
        return found

    async def call_tool(self, name: str, arguments: Any) -> Any:
        try:
            async with asyncio.timeout(self.timeout):
                return await self.request(
                    Call(self.id, "tools/call"), "tools/call", {"name": name, "arguments": arguments}
                )
        except TimeoutError:
            raise McpError(TIMED_OUT, f"MCP server {self.id!r} did not answer within {self.timeout:g} s") from None

    async def request(self, call: Call, method: str, params: dict[str, Any]) -> dict[str, Any]:
        await self._wait_until_running()
        return await self._ask(call, params)

    async def _wait_until_running(self) -> None:
        if self._stopping or self.state == "failed":
            raise McpError(NOT_AVAILABLE, f"MCP server {self.id!r} does not run: {self.error}")
        await self._running.wait()

    async def _ask(self, call: Call, params: dict[str, Any]) -> dict[str, Any]:
        dispatcher = self._dispatcher
        if dispatcher is None:
            raise McpError(NOT_AVAILABLE, f"MCP server {self.id!r} does not run: {self.error}")
        token = f"hayhost-{next(self._tokens)}"
        params = call.stamped(params, token if call.progress_token is not None else None)
        if self._version == _MODERN:
            params = self._enveloped(params)
        self._calls[token] = call
        try:
            return await dispatcher.send_raw_request(call.method, params, self._options(call.method, params))
        except MCPError as error:
            raise McpError(error.code, error.message, error.data) from None
        except asyncio.CancelledError:
            self._check()
            raise
        finally:
            del self._calls[token]

    def _enveloped(self, params: dict[str, Any]) -> dict[str, Any]:
        """``params`` as a request without a handshake has them: who asks, and what they can do."""
        meta = {
            CLIENT_INFO_META_KEY: INITIALIZE["clientInfo"],
            CLIENT_CAPABILITIES_META_KEY: {},
            **params.get("_meta", {}),
            PROTOCOL_VERSION_META_KEY: self._version,
        }
        return {**params, "_meta": meta}

    def _options(self, method: str, params: Mapping[str, Any]) -> CallOptions:
        headers = {MCP_PROTOCOL_VERSION_HEADER: self._version}
        if self._version == _MODERN:
            headers[MCP_METHOD_HEADER] = method
            name = params.get(NAME_BEARING_METHODS.get(method, ""))
            if isinstance(name, str):
                headers[MCP_NAME_HEADER] = encode_header_value(name)
        return {"headers": headers}

    def _check(self) -> None:
        """See whether it still answers at all, now that somebody has waited in vain; if not, begin anew."""
        if self._checking is None or self._checking.done():
            self._checking = asyncio.create_task(self._ping())

    async def _ping(self) -> None:
        dispatcher, session = self._dispatcher, self._session
        if dispatcher is None or session is None or self._version == _MODERN:
            return
        try:
            async with asyncio.timeout(_PING_TIMEOUT):
                with contextlib.suppress(MCPError):  # an error is an answer
                    await dispatcher.send_raw_request("ping", None, _CANNOT_BE_CANCELLED)
        except TimeoutError:
            if self._dispatcher is dispatcher:
                self.why = "it does not answer"
                session.cancel()


def _first(errors: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
