"""A server object of the official ``mcp`` package, asked within the process: no streams, no serialisation.

Both generations of the protocol are served at once: the one that begins with a handshake, which is made when the server
starts, and the one in which each request says for itself who asks.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Final

import anyio
from mcp.server.connection import Connection
from mcp.server.lowlevel import Server as LowLevel
from mcp.server.mcpserver import MCPServer
from mcp.server.runner import ServerRunner, modern_on_request
from mcp.shared.dispatcher import CallOptions, DispatchContext, OnRequest
from mcp.shared.exceptions import MCPError
from mcp.shared.jsonrpc_dispatcher import handler_exception_to_error_data
from mcp.shared.message import MessageMetadata
from mcp.shared.transport_context import TransportContext
from mcp_types import CLIENT_CAPABILITIES_META_KEY, CLIENT_INFO_META_KEY, PROTOCOL_VERSION_META_KEY
from mcp_types.version import MODERN_PROTOCOL_VERSIONS

from .protocol import INTERNAL_ERROR, NOT_AVAILABLE, TIMED_OUT, Call, McpError
from .server import INITIALIZE, Failed, Notice, Server, info_of, pages, usable

__all__ = ["OfficialServer", "is_official"]

_TRANSPORT: Final = TransportContext(kind="local", can_send_request=True)
_LISTEN: Final = "subscriptions/listen"
_SUBSCRIBE: Final = "resources/subscribe"
_UNSUBSCRIBE: Final = "resources/unsubscribe"
_ACKNOWLEDGED: Final = "notifications/subscriptions/acknowledged"
_EVENTS: Final = {"toolsListChanged": True, "promptsListChanged": True, "resourcesListChanged": True}
_META: Final = {
    PROTOCOL_VERSION_META_KEY: MODERN_PROTOCOL_VERSIONS[-1],
    CLIENT_INFO_META_KEY: INITIALIZE["clientInfo"],
    CLIENT_CAPABILITIES_META_KEY: {},
}
_MOST_WATCHED: Final = 1_000  # resources whose changes clients of the org want to hear of


def is_official(candidate: Any) -> bool:
    """Whether ``candidate`` is a server object of the package, of either of its APIs."""
    return isinstance(candidate, LowLevel | MCPServer)


class OfficialServer(Server):
    """``notice`` hears what the server says apart from any request."""

    def __init__(self, id: str, target: Any, changed: Callable[[], None], failed: Failed, notice: Notice) -> None:
        super().__init__(id, changed, failed)
        self._target: LowLevel[Any] = target._lowlevel_server if isinstance(target, MCPServer) else target
        self._notice = notice
        self._ids = itertools.count(1)
        self._listed: dict[str, list[dict[str, Any]]] = {}
        self._capabilities: Mapping[str, Any] = {}
        self._calls: set[Call] = set()
        self._ended = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._watching: dict[str, tuple[asyncio.Task[None], asyncio.Event]] = {}
        """What listens for changes of a resource, by its URI, and whether it does already."""
        self._runner: ServerRunner[Any] | None = None
        self._modern: OnRequest | None = None

    async def start(self) -> None:
        """Enter its lifespan and initialize it. Raises what it raises."""
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._life = asyncio.create_task(self._live(begun))
        await begun

    async def _live(self, begun: "asyncio.Future[None]") -> None:
        """Its lifespan is entered and left in one task."""
        try:
            async with contextlib.AsyncExitStack() as stack:
                lifespan = await stack.enter_async_context(self._target.lifespan(self._target))
                context = _Context(self, None)
                self._runner = ServerRunner(self._target, Connection.for_loop(context), lifespan)
                self._modern = modern_on_request(self._target, lifespan)
                result = await self._runner.on_request(context, "initialize", INITIALIZE)
                await self._runner.on_notify(context, "notifications/initialized", None)
                self.info = info_of(result, (result["protocolVersion"], *MODERN_PROTOCOL_VERSIONS))
                self._capabilities = result.get("capabilities", {})
                listening = asyncio.create_task(self._listen(_EVENTS))
                begun.set_result(None)
                self.to("running")
                await self._ended.wait()
                for task in (listening, *(task for task, _ in self._watching.values())):
                    task.cancel()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            if begun.done():
                self._failed(f"MCP server {self.id!r} failed to stop", error)
            else:
                begun.set_exception(RuntimeError(f"{type(error).__name__}: {error}") if _exits(error) else error)

    @property
    def _tells(self) -> bool:
        """Whether it can be listened to in the way of servers that have no connections."""
        return self._modern is not None and self._target.get_request_handler(_LISTEN) is not None

    async def _listen(self, events: Mapping[str, Any]) -> None:
        """Hear of ``events``, for as long as it says something."""
        if self._modern is not None and self._tells:
            try:
                await self._modern(_Context(self, None, "hayhost"), _LISTEN, {"notifications": events, "_meta": _META})
            except Exception as error:
                self._failed(f"MCP server {self.id!r} cannot be listened to", error)

    async def _watch(self, call: Call, method: str, uri: str) -> dict[str, Any]:
        """Listen for changes of a resource from now on, or no more: in both ways, if it knows both."""
        if self._tells:
            if method == _UNSUBSCRIBE:
                if (known := self._watching.pop(uri, None)) is not None:
                    known[0].cancel()
            elif uri not in self._watching:
                if len(self._watching) >= _MOST_WATCHED:
                    raise McpError(NOT_AVAILABLE, f"more than {_MOST_WATCHED} resources are subscribed to")
                task, begun = asyncio.create_task(self._listen({"resourceSubscriptions": [uri]})), asyncio.Event()
                self._watching[uri] = task, begun
                task.add_done_callback(lambda _: begun.set())  # it will say nothing
                await begun.wait()
        if self._tells and self._target.get_request_handler(method) is None:
            return {}
        return await self._ask(call, method, {"uri": uri})

    def hear(self, call: Call | None, method: str, params: Mapping[str, Any] | None) -> None:
        """Take a notification of the server's, made within ``call`` if it is known."""
        if method.endswith("/list_changed") and (call is None or call.method != _LISTEN):
            self.list_changed()
        elif method == _ACKNOWLEDGED:
            for uri in ((params or {}).get("notifications") or {}).get("resourceSubscriptions") or ():
                if uri in self._watching:
                    self._watching[uri][1].set()
        elif call is None:
            self._notice(self.id, method, params)
        elif method == "notifications/progress":
            call.progress(params or {})
        else:
            call.tell(method, params)

    def whom(self, call: Call | None) -> Call | None:
        """Whose client the server means to ask: that of ``call``, or of the only one there is."""
        return call if call is not None or len(self._calls) != 1 else next(iter(self._calls))

    async def list(self, method: str) -> list[dict[str, Any]]:
        async def page(params: dict[str, Any]) -> dict[str, Any]:
            return await self._ask(Call(self.id, method), method, params)

        if method == "tools/list" and "tools" not in self._capabilities:
            return []
        found = usable(self.id, method, await pages(method, page), self._failed)
        if found != self._listed.get(method, found):
            self.list_changed()
        self._listed[method] = found
        return found

    async def call_tool(self, name: str, arguments: Any) -> Any:
        call = Call(self.id, "tools/call")
        return await self._ask(call, "tools/call", {"name": name, "arguments": arguments})

    async def request(self, call: Call, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if method in (_SUBSCRIBE, _UNSUBSCRIBE) and isinstance(uri := params.get("uri"), str):
            return await self._watch(call, method, uri)
        return await self._ask(call, method, call.stamped(params, call.progress_token))

    async def _ask(self, call: Call, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if self._runner is None or self._modern is None or self._ended.is_set():
            raise McpError(NOT_AVAILABLE, "the server has stopped")
        meta = params.get("_meta")
        modern = isinstance(meta, dict) and meta.get(PROTOCOL_VERSION_META_KEY) in MODERN_PROTOCOL_VERSIONS
        ask = self._modern if modern else self._runner.on_request
        self._calls.add(call)
        try:
            return await ask(_Context(self, call, next(self._ids)), method, params)
        except (Exception, SystemExit) as error:
            data = handler_exception_to_error_data(error)
            if data is not None:
                raise McpError(data.code, data.message, data.data) from error
            self._failed(f"MCP server {self.id!r} failed at {method[:100]}", error)
            raise McpError(INTERNAL_ERROR, str(error) or type(error).__name__) from error
        finally:
            self._calls.discard(call)

    async def stop(self) -> None:
        self._ended.set()
        if self._life is not None:
            await self._life


def _exits(error: BaseException) -> bool:
    return not isinstance(error, Exception)


class _Context(DispatchContext[TransportContext]):
    """What a handler of the server has of the request that it handles: the way back to who asked."""

    def __init__(self, server: OfficialServer, call: Call | None, id: int | str | None = None) -> None:
        self._server = server
        self._call = call
        self._id = id
        self._cancelled = anyio.Event()

    @property
    def transport(self) -> TransportContext:
        return _TRANSPORT

    @property
    def can_send_request(self) -> bool:
        return True

    @property
    def request_id(self) -> int | str | None:
        return self._id

    @property
    def message_metadata(self) -> MessageMetadata:
        return None

    @property
    def cancel_requested(self) -> anyio.Event:
        return self._cancelled

    async def send_raw_request(
        self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None
    ) -> dict[str, Any]:
        call = self._server.whom(self._call)
        if call is None:
            raise MCPError(NOT_AVAILABLE, "a client can be asked in a request of its own only")
        try:
            async with asyncio.timeout((opts or {}).get("timeout")):
                return await call.ask(method, params or {})
        except McpError as error:
            raise MCPError(error.code, error.message, error.data) from None
        except TimeoutError:
            raise MCPError(TIMED_OUT, "the client did not answer in time") from None

    async def notify(self, method: str, params: Mapping[str, Any] | None, opts: CallOptions | None = None) -> None:
        self._server.hear(self._call, method, params)

    async def progress(self, progress: float, total: float | None = None, message: str | None = None) -> None:
        params = {"progress": progress, "total": total, "message": message}
        if self._call is not None:
            self._call.progress({key: value for key, value in params.items() if value is not None})
