"""One MCP endpoint as one credential sees it: the official package's sessions in front of an org's servers."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, get_args

import mcp_types as types
from mcp.server.caching import CacheHint
from mcp.server.lowlevel.server import NotificationOptions, Server
from mcp.server.streamable_http_manager import StreamableHTTPSessionManager
from mcp.server.subscriptions import ListenHandler
from mcp.shared.subscriptions import (
    PromptsListChanged,
    ResourcesListChanged,
    ResourceUpdated,
    ServerEvent,
    ToolsListChanged,
)
from mcp_types.methods import CacheableMethod

from hayhost import __version__
from hayhost.catalog import Plugin
from hayhost.installs import ToolLists

from .asgi import App, Bridge, Message
from .clients import Session
from .listings import Shelf
from .methods import Methods, Parts
from .shape import KEYS
from .view import ALL, View

__all__ = ["Endpoint"]

_HINTS: Final[dict[CacheableMethod, CacheHint]] = dict.fromkeys(get_args(CacheableMethod), CacheHint(0, "private"))

_MOST_LISTENING: Final = 100  # streams of news in the revision without sessions
_TELL: Final = 5.0
_EVENTS: Final[dict[str, ServerEvent]] = {
    "tools/list": ToolsListChanged(),
    "prompts/list": PromptsListChanged(),
    "resources/list": ResourcesListChanged(),
    "resources/templates/list": ResourcesListChanged(),
}


class _Bus:
    """News for the listeners of one endpoint."""

    def __init__(self) -> None:
        self.listeners: dict[object, Callable[[ServerEvent], None]] = {}

    async def publish(self, event: ServerEvent) -> None:
        for listener in list(self.listeners.values()):
            listener(event)

    def subscribe(self, listener: Callable[[ServerEvent], None]) -> Callable[[], None]:
        token = object()
        self.listeners[token] = listener

        def unsubscribe() -> None:
            self.listeners.pop(token, None)

        return unsubscribe


class _Server(Server[Any]):
    """The official package's, saying what the servers behind it can do."""

    offered: frozenset[str] = ALL

    def get_capabilities(
        self,
        notification_options: NotificationOptions | None = None,
        experimental_capabilities: dict[str, dict[str, Any]] | None = None,
        extensions: dict[str, dict[str, Any]] | None = None,
        *,
        protocol_version: str | None = None,
    ) -> types.ServerCapabilities:
        everything = super().get_capabilities(
            NotificationOptions(True, True, True),
            experimental_capabilities,
            extensions,
            protocol_version=protocol_version,
        )
        return everything.model_copy(update=dict.fromkeys(ALL - self.offered - {"tools"}))


class Endpoint:
    """The MCP servers of one org, of one plugin or of all, for one credential.

    ``shelves()`` are those servers now. ``run`` must run while it is used.
    """

    def __init__(
        self,
        parts: Parts,
        org_id: str,
        plugin: Plugin | None,
        actor: str,
        shelves: Callable[[], Awaitable[list[Shelf]]],
    ) -> None:
        self.org_id = org_id
        self.active = 0
        self.used = asyncio.get_running_loop().time()
        self.closing = asyncio.Event()
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.plugin = plugin
        self._parts = parts
        self._shelves = shelves
        self._sessions: dict[str, Session] = {}
        self._streams: set[Bridge] = set()  # that go on until somebody ends them
        self._bus = _Bus()
        self._listening = ListenHandler(self._bus, max_subscriptions=_MOST_LISTENING, max_buffered_events=64)
        self._telling: set[asyncio.Task[None]] = set()
        self._view: View | None = None
        self._view_of: object = None
        self._told: dict[str, object] = {}
        self._server = _Server(
            plugin.name if plugin else "hayhost",
            version=plugin.manifest.version if plugin else __version__,
            title=plugin.manifest.display_name if plugin else None,
            cache_hints=_HINTS,
            get_tool_input_schema=self._schema_of,
        )
        Methods(
            parts, org_id, plugin.name if plugin else "", actor, self._sessions, self._look, self._listening
        ).add_to(self._server)
        self._manager = StreamableHTTPSessionManager(
            self._server,
            session_idle_timeout=parts.settings.mcp_session_timeout,
            max_sessions=parts.settings.mcp_sessions,
            max_request_body_size=parts.settings.max_body,
        )

    async def run(self) -> None:
        """Be there until ``closing`` is set."""
        async with self._manager.run():
            self.started.set_result(None)
            await self.closing.wait()
            for task in self._telling:
                task.cancel()

    @property
    def idle_since(self) -> float:
        """Since when nobody uses it, in the loop's time; infinite while somebody does."""
        return math.inf if self.active else self.used

    # ---- HTTP

    async def handle(self, bridge: Bridge, request_id: str) -> None:
        """Answer one request."""
        loop = asyncio.get_running_loop()
        scope = {**bridge.scope, "hayhost.request": request_id}
        id = dict(scope["headers"]).get(b"mcp-session-id", b"").decode("latin-1")
        session = self._sessions.get(id)
        endless = scope["method"] == "GET"
        self.active += 1
        if session is not None:
            session.active += 1
        if endless:
            self._streams.add(bridge)

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._responding(id, scope["method"], message)
            await bridge.answer(message)

        try:
            if scope["method"] == "POST":
                await self._look()
            app: App = self._manager.handle_request
            await app(scope, bridge.receive, send)
        finally:
            self.active -= 1
            self._streams.discard(bridge)
            self.used = loop.time()
            if session is not None:
                session.active -= 1
                session.used = self.used

    def _responding(self, id: str, method: str, message: Message) -> None:
        """Keep word of which sessions there are."""
        status, headers = message["status"], dict(message.get("headers", ()))
        if not id and status == 200 and (new := headers.get(b"mcp-session-id", b"").decode("latin-1")):
            self._sessions[new] = Session(asyncio.get_running_loop().time())
        elif status == 404 or (method == "DELETE" and status == 200):
            self._forget(id)

    def prune(self, now: float) -> None:
        """Forget sessions that the package has let go."""
        oldest = now - self._parts.settings.mcp_session_timeout - _TELL
        for id, session in list(self._sessions.items()):
            if not session.active and session.used < oldest:
                self._forget(id)

    def _forget(self, id: str) -> None:
        session = self._sessions.pop(id, None)
        if session is not None:
            for shelf, uri in session.watched:
                self._parts.listings.unwatch(shelf, uri)

    def end_streams(self) -> None:
        """End what would go on for ever, and leave the rest to finish."""
        self._listening.close()
        for bridge in list(self._streams):
            bridge.end()

    # ---- what there is

    async def _look(self, again: bool = False) -> View:
        """The lists, asked for if nobody ever did, or ``again``, where that starts no worker."""
        shelves = await self._shelves()
        if again:
            await asyncio.gather(*(self._parts.listings.look_again(shelf) for shelf in shelves))
        if waiting := [self._parts.listings.ensure(shelf) for shelf in shelves if not shelf.known]:
            await asyncio.gather(*waiting)
        lists = await self._parts.policy.tool_lists(self.org_id)
        view = self._compile(shelves, lists)
        if not self._told:
            self._told = self._marks(shelves, lists)
        return view

    def _compile(self, shelves: list[Shelf], lists: ToolLists) -> View:
        of = tuple((shelf, *shelf.marks.values(), tuple(shelf.servers)) for shelf in shelves), lists
        if self._view is None or self._view_of != of:
            self._view = View(shelves, lists, f"{hash(of) & 0xFFFFFFFF:08x}", with_plugin=self.plugin is None)
            self._view_of = of
            self._server.instructions = self._view.instructions
            self._server.offered = self._view.capabilities if self.plugin else ALL
        return self._view

    def _marks(self, shelves: list[Shelf], lists: ToolLists) -> dict[str, object]:
        return {
            method: (*((shelf.plugin.name, shelf.marks[method]) for shelf in shelves if shelf.marks[method]), lists)
            if method == "tools/list"
            else tuple((shelf.plugin.name, shelf.marks[method]) for shelf in shelves if shelf.marks[method])
            for method in KEYS
        }

    def _schema_of(self, name: str) -> Mapping[str, Any] | None:
        entry = self._view.tools.get(name) if self._view else None
        return entry.item["inputSchema"] if entry else None

    async def tell_changes(self) -> None:
        """Tell clients which lists are others than when they were told last."""
        if not self._told or not (self._sessions or self._bus.listeners):
            self._told = {}
            return
        shelves = await self._shelves()
        for shelf in shelves:
            if not shelf.known and not shelf.problem:
                self._parts.listings.refresh(shelf)
        marks = self._marks(shelves, await self._parts.policy.tool_lists(self.org_id))
        told, self._told = self._told, marks
        for event in dict.fromkeys(_EVENTS[method] for method in KEYS if marks[method] != told.get(method)):
            await self._publish(event)

    async def _publish(self, event: ServerEvent) -> None:
        await self._bus.publish(event)
        for session in list(self._sessions.values()):
            self._tell(session, event)

    def _tell(self, session: Session, event: ServerEvent) -> None:
        async def tell() -> None:
            try:
                async with asyncio.timeout(_TELL):
                    await session.tell(event)
            except Exception:  # it is on its way out, or does not read
                pass

        if session.channel is not None:
            task = asyncio.create_task(tell())
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

    async def notice(self, shelf: Shelf, message: dict[str, Any]) -> None:
        """A server says something that belongs to no request."""
        params = message.get("params")
        if shelf not in await self._shelves() or not isinstance(params, dict):
            return
        if message.get("method") == "notifications/resources/updated" and isinstance(uri := params.get("uri"), str):
            event = ResourceUpdated(uri)
            await self._bus.publish(event)
            for session in list(self._sessions.values()):
                if (shelf, uri) in session.watched:
                    self._tell(session, event)
