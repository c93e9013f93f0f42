"""The way from a URL to a worker, and the one place where errors become HTTP."""

import asyncio
import itertools
import os
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import formatdate
from typing import TYPE_CHECKING, Any, Final

import msgspec
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, HTTPServerConnectionDelegate

from sandbox import wire

from .access import Access
from .answers import Answer, Call, NotYetError, Principal
from .api.decoding import read_json
from .catalog import Plugin
from .errors import InvalidError, NotFoundError, RequestError, StoreError, UnavailableError
from .exchange import Exchange
from .installs import Auth, Change, NotLoadedError, ToolLists
from .layout import Layout, Own, Place
from .logs import get_logger
from .management import Management
from .mcp import METADATA_PATH, METHODS, Gateway
from .metrics.counts import LEFT, Counts
from .metrics.histogram import Histogram
from .pool import Pool
from .rates import Rates
from .responses import RequestHead
from .routes import HOST_ROUTES, Match
from .settings import Settings
from .states import WorkerState
from .version import Version

if TYPE_CHECKING:
    from .tracing import Tracing

__all__ = ["Front"]

NOBODY: Final = Principal("nobody", "")
"""Who asks for what is open to all."""

_TICK: Final = 0.25
# An idle keep-alive connection, or one that takes its time over the headers, is closed after this long.
_IDLE_CONNECTION: Final = 75.0

_TOOLS: Final = ("/mcp/list-tools", "/mcp/call-tool")

Host = Callable[[Place, bytes, str], Awaitable[Answer]]


class Front(HTTPServerConnectionDelegate):
    """Takes each request to where it belongs."""

    def __init__(
        self,
        settings: Settings,
        management: Management,
        layout: Layout,
        access: Access,
        mcp: Gateway,
        rates: Rates,
        *,
        access_log: bool = False,
        tracing: "Tracing | None" = None,
    ) -> None:
        self.settings = settings
        self.access = access
        self.loop = asyncio.get_running_loop()
        self.open: set[Exchange] = set()
        self.stopping = False
        self.counts = Counts()
        """Of requests to the host itself, and to nobody."""
        self.loop_lag = Histogram()
        """By how much a timer was late, four times a second."""
        self._management = management
        self._pool: Pool = management.pool
        self._rates = rates
        self._layout = layout
        self._mcp = mcp
        self._access_log = access_log
        self._tracing = tracing
        self._due: OrderedDict[Exchange, None] = OrderedDict()  # all have the same limit, so the first is due first
        self._idle: dict[object, tuple[float, HTTP1Connection]] = {}
        """Connections that wait for a request's head, and until when they may: the first is due first."""
        self.leaving: set[object] = set()
        """Connections that are closed already, and whose end Tornado has not told yet."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = f"{os.urandom(4).hex()}-{{}}".format
        self._count = 0
        self._date = (0, "")
        self._end_of_head = ("", b"")
        self._ticker = self.loop.create_task(self._tick())
        self._hosts: dict[str, Host] = {
            "/metadata": self._metadata,
            "/health": self._health,
            "/validate-auth": self._validate_auth,
            "/config-update": self._config_update,
            "/disable": self._disable,
        }
        self.nothing_open = asyncio.Event()
        self.nothing_open.set()

    def start_request(self, server_conn: object, request_conn: Any) -> HTTPMessageDelegate:
        assert isinstance(request_conn, HTTP1Connection)
        request_conn.stream.answering = False  # type: ignore[attr-defined]  # of the host's own kind
        self._idle[server_conn] = (self.loop.time() + _IDLE_CONNECTION, request_conn)
        return Exchange(self, request_conn, server_conn)

    def on_close(self, server_conn: object) -> None:
        self._idle.pop(server_conn, None)
        self.leaving.discard(server_conn)

    def make_room(self, count: int) -> int:
        """Close up to ``count`` connections that wait for a request's head, the longest idle first; how many."""
        longest = list(itertools.islice(self._idle.items(), count))
        for server_conn, (_, connection) in longest:
            del self._idle[server_conn]
            self.leaving.add(server_conn)
            connection.close()
        return len(longest)

    # ---- what exchanges tell

    def begun(self, exchange: Exchange, server_conn: object) -> None:
        """The head of a request is there."""
        self._idle.pop(server_conn, None)  # it may have been closed just now
        self.open.add(exchange)
        self.nothing_open.clear()
        self.wait_for(exchange)

    def wait_for(self, exchange: Exchange) -> None:
        """The request's limit runs from now: the client, a worker or a queue is waited for."""
        exchange.deadline = self.loop.time() + self.settings.request_timeout
        self._due[exchange] = None
        self._due.move_to_end(exchange)

    def answering(self, exchange: Exchange) -> None:
        """Nobody is waited for just now."""
        self._due.pop(exchange, None)

    def answered(self, exchange: Exchange) -> None:
        """The head of its answer leaves now."""
        self._due.pop(exchange, None)
        now = self.loop.time()
        seconds = now - exchange.started
        exchange.counts.add(exchange.status, seconds)
        if exchange.slot is not None:
            exchange.slot.answered(now, seconds, exchange.status)

    def closed(self, exchange: Exchange) -> None:
        """The exchange is over."""
        self._due.pop(exchange, None)
        if exchange.trace is not None:
            exchange.trace.end(exchange.status)
        if not exchange.status:
            exchange.counts.add(LEFT, self.loop.time() - exchange.started)
        self.open.discard(exchange)
        if exchange.when_closed is not None:
            exchange.when_closed()
        if not self.open:
            self.nothing_open.set()
        if self._access_log:
            slot = exchange.slot
            where = {"plugin": slot.plugin.name, "org": slot.org_id} if slot else {}
            took = round((self.loop.time() - exchange.started) * 1000, 1)
            get_logger().info(
                f"{exchange.method} {exchange.path[:200]}",
                **where,
                status=exchange.status,
                ms=took,
                request=exchange.id,
            )

    def date(self) -> str:
        """Now, as HTTP writes it."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = (now, formatdate(now, usegmt=True))
        return self._date[1]

    def end_of_head(self) -> bytes:
        """The last headers of an answer, and the empty line."""
        date = self.date()
        if self._end_of_head[0] != date:
            self._end_of_head = (date, f"Date: {date}\r\nServer: hayhost\r\n\r\n".encode())
        return self._end_of_head[1]

    def malformed(self) -> bytes:
        """The last answer on a connection, to what is no HTTP."""
        body = msgspec.json.encode({"error": "The request is not valid HTTP"})
        head = (
            f"HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\nCache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\n"
        )
        return head.encode() + self.end_of_head() + body

    async def _tick(self) -> None:
        while True:
            due = self.loop.time() + _TICK
            await asyncio.sleep(_TICK)
            now = self.loop.time()
            self.loop_lag.add(now - due)
            while self._due:
                exchange = next(iter(self._due))
                if exchange.deadline > now:
                    break
                del self._due[exchange]
                exchange.timed_out()
            self._close_idle(now)

    def _close_idle(self, now: float) -> None:
        for _, connection in list(itertools.takewhile(lambda idle: idle[0] < now, self._idle.values())):
            connection.close()

    @property
    def idle_connections(self) -> int:
        """How many connections wait for a request."""
        return len(self._idle)

    def close(self) -> None:
        """Stop the clock."""
        self._ticker.cancel()
        for task in self._tasks:
            task.cancel()

    # ---- routing

    def route(self, exchange: Exchange, head: RequestHead, headers: HTTPHeaders) -> None:
        """Decide where a request goes.

        Raises ``RequestError`` if it goes nowhere, ``NotYetError`` if it can not be known yet.
        """
        if not exchange.path.startswith("/"):
            raise RequestError("The request's target must be a path", status=400)
        if head.hosts > 1 or (not head.hosts and exchange.version == "HTTP/1.1"):
            raise RequestError("A request needs exactly one Host header", status=400)
        own = self._layout.own(exchange.path)
        if own is not None:
            self._route_own(exchange, head, headers, own)
            return
        if self.stopping:
            raise UnavailableError("The host is stopping")
        if exchange.path.startswith(f"{METADATA_PATH}/"):
            self._mcp_metadata(exchange, headers, exchange.path.removeprefix(METADATA_PATH))
            return
        if (org_id := self._layout.org(exchange.path)) is not None:
            self._to_mcp(exchange, headers, org_id, None)
            return
        place = self._find(exchange.path)
        exchange.counts = place.plugin.counts.other
        if not place.plugin.settled.is_set():
            raise NotYetError(place.plugin.settled.wait, "The plugin is still loading")
        if place.path == "/mcp":
            self._to_mcp(exchange, headers, place.org_id, place.plugin)
            return
        method = HOST_ROUTES.get(place.path)
        if method is not None:
            exchange.counts = place.plugin.counts.host(exchange.method, place.path)
        if method is not None and place.path not in ("/metadata", "/health"):
            self.access.check_origin(headers, exchange.peer)
            self._need_principal(exchange, headers, place.org_id)
        elif (method is None and self.settings.route_tokens) or (head.has_token and self.access.has_tokens):
            # What is open to all is not open to those who show that they are of another org.
            self._need_principal(exchange, headers, place.org_id)
        lists = self._mcp.tools_of(place.org_id) if place.path in _TOOLS else ToolLists()
        self._rates.check(place.plugin.name, place.org_id)
        self._count += 1
        exchange.id = self._ids(self._count)
        exchange.base, exchange.path = place.base, place.path
        if method is not None:
            if self._is_method(exchange, frozenset({method, "HEAD"} if method == "GET" else {method})):
                self._trace(exchange, head, place, place.path)
                exchange.to_host(lambda exchange, body: self._answer(exchange, place, body, lists))
            return
        slot = self._pool.find(place.plugin, place.org_id)
        # The org's worker may still be of the version before: what it does not have, it cannot answer.
        version = slot.worker.version if slot is not None and slot.worker is not None else self._loaded(place)
        found = self.match(exchange, version)
        if found is not None:
            route = version.metadata.routes[found.route]
            exchange.counts = place.plugin.counts.route(route.method, route.path)
            self._trace(exchange, head, place, route.path)
            exchange.to_plugin(slot or self._pool.slot(place.plugin, place.org_id), found.route, found.params, version)

    def _trace(self, exchange: Exchange, head: RequestHead, place: Place, route: str) -> None:
        if self._tracing is None:
            return
        if place.base != "/":
            route = f"/plugins/{{plugin}}/{{org}}{route}"
        seconds = self.loop.time() - exchange.started
        exchange.trace = self._tracing.request(
            head.for_plugin, exchange.method, route, place.plugin.name, place.org_id, exchange.id, seconds
        )

    def match(self, exchange: Exchange, version: Version) -> Match | None:
        """The route of a request in ``version``; ``None`` if it is answered here. Raises ``RequestError``."""
        found = version.routes.match(exchange.method, exchange.path)
        if isinstance(found, Match):
            return found
        if not found:
            raise RequestError("The plugin has no such route", status=404)
        self._is_method(exchange, found)
        return None

    def _find(self, path: str) -> Place:
        try:
            return self._layout.find(path)
        except NotLoadedError as error:
            plugin, org = error.plugin, error.org
            raise NotYetError(lambda: self._pool.installs.load(plugin, org), "The store is too busy") from None

    def _to_mcp(self, exchange: Exchange, headers: HTTPHeaders, org_id: str, plugin: Plugin | None) -> None:
        """To the endpoint of an org's MCP servers, those of ``plugin`` or all."""
        if plugin is not None:
            exchange.counts = plugin.counts.host(exchange.method, "/mcp")
        else:
            exchange.counts = self.counts.host(exchange.method, "/orgs/{org}/mcp")
        self.access.check_origin(headers, exchange.peer)
        if not self._is_method(exchange, METHODS):
            return
        self._need_principal(
            exchange, headers, org_id, f"{self._origin(exchange, headers)}{METADATA_PATH}{exchange.path}"
        )
        try:
            self._mcp.check(org_id, plugin)
        except NotLoadedError:
            raise NotYetError(lambda: self._mcp.plugins_of(org_id), "The store is too busy") from None
        if plugin is not None:
            self._rates.check(plugin.name, org_id)
        else:
            self._rates.check_org(org_id)
        self._count += 1
        exchange.id = self._ids(self._count)
        exchange.to_host(lambda exchange, body: self._mcp.answer(exchange, body, org_id, plugin))

    def _mcp_metadata(self, exchange: Exchange, headers: HTTPHeaders, path: str) -> None:
        """How the endpoint at ``path`` is protected (RFC 9728): by tokens that the host's operator hands out."""
        if self._layout.org(path) is None and self._find(path).path != "/mcp":
            raise RequestError("There is nothing at this address", status=404)
        resource = f"{self._origin(exchange, headers)}{path}"
        answer = Answer(200, {"resource": resource, "bearer_methods_supported": ["header"]})
        if self._is_method(exchange, frozenset({"GET", "HEAD"})):
            exchange.to_host(lambda exchange, _body: exchange.answer(answer))

    def _need_principal(
        self, exchange: Exchange, headers: HTTPHeaders, org_id: str | None = None, metadata: str = ""
    ) -> None:
        """Raises ``RequestError`` if a token is needed, or is one of another org's.

        ``metadata`` is the URL that tells a client without a good one how the resource is protected.
        """
        if exchange.principal is None:

            async def identify() -> None:
                try:
                    exchange.principal = await self.access.principal(headers)
                except RequestError as error:
                    challenge = error.headers.get("WWW-Authenticate", "")
                    if metadata and challenge:
                        separator = ", " if "=" in challenge else " "
                        error.headers["WWW-Authenticate"] = f'{challenge}{separator}resource_metadata="{metadata}"'
                    raise

            raise NotYetError(identify, "The store is too busy")
        if org_id is not None and not exchange.principal.may(org_id):
            raise RequestError("The token is good for another organisation only", status=403)

    def _route_own(self, exchange: Exchange, head: RequestHead, headers: HTTPHeaders, own: Own) -> None:
        exchange.counts = self.counts.host(exchange.method, own.route)
        if own.managing:
            self.access.check_origin(headers, exchange.peer, navigation=own.navigation)
        if not self._is_method(exchange, frozenset(own.methods)):
            return
        if own.managing and (not own.open or (head.has_token and self.access.has_tokens)):
            self._need_principal(exchange, headers)
        handler = own.methods["GET" if exchange.method == "HEAD" else exchange.method]
        exchange.to_host(lambda exchange, body: self._spawn(exchange, handler(self._call(exchange, headers, body))))

    def _call(self, exchange: Exchange, headers: HTTPHeaders, body: bytes) -> Call:
        _, secure = self.access.reached(headers, exchange.peer)
        principal = exchange.principal or NOBODY
        origin = self._origin(exchange, headers)
        return Call(exchange.method, exchange.path, exchange.query, headers, body, principal, origin, secure)

    def _origin(self, exchange: Exchange, headers: HTTPHeaders) -> str:
        """The scheme and authority by which the client reached the host."""
        host, secure = self.access.reached(headers, exchange.peer)
        return f"{'https' if secure else 'http'}://{host}"

    def _is_method(self, exchange: Exchange, allowed: frozenset[str]) -> bool:
        """Whether the request has an ``allowed`` method. If not, OPTIONS is answered here and any other is a 405."""
        if exchange.method in allowed:
            return True
        allow = ", ".join(sorted(allowed | {"OPTIONS"}))
        if exchange.method != "OPTIONS":
            raise RequestError(f"This path answers {allow}", status=405, headers={"Allow": allow})
        exchange.to_host(lambda exchange, _body: exchange.answer(Answer(204, None, {"Allow": allow})))
        return False

    # ---- what the host answers for a worker

    def _answer(self, exchange: Exchange, place: Place, body: bytes, lists: ToolLists) -> None:
        if place.path == "/mcp/list-tools":
            self._list_tools(exchange, place, lists)
        elif place.path == "/mcp/call-tool":
            self._call_tool(exchange, place, body, lists)
        else:
            actor = exchange.principal.actor if exchange.principal else ""
            self._spawn(exchange, self._hosts[place.path](place, body, actor))

    def _spawn(self, exchange: Exchange, answer: Awaitable[Answer]) -> None:
        task = self.loop.create_task(self._run(exchange, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, exchange: Exchange, answer: Awaitable[Answer]) -> None:
        try:
            exchange.answer(await answer)
        except RequestError as error:
            exchange.refuse(error)
        except InvalidError as error:
            problems = [{"field": field, "message": message} for field, message in error.fields.items()]
            exchange.answer(Answer(422, {"error": str(error), "errors": problems}))
        except StoreError as error:
            retry = {"Retry-After": "1"} if error.status == 503 else {}
            exchange.refuse(RequestError(str(error), status=error.status, headers=retry))
        except asyncio.CancelledError:
            exchange.refuse(UnavailableError("The host is stopping"))
            raise
        except Exception as error:  # a bug of ours: the client learns no more than that
            get_logger().exception("an internal error", request=exchange.id, path=exchange.path, reason=repr(error))
            exchange.refuse(RequestError("Internal server error"))

    def _loaded(self, place: Place) -> Version:
        if (version := place.plugin.current) is None:
            raise UnavailableError(f"The plugin {place.plugin.name} is not loaded: {place.plugin.reason}", 5)
        return version

    async def _metadata(self, place: Place, _body: bytes, _actor: str) -> Answer:
        metadata = msgspec.to_builtins(self._loaded(place).metadata)
        slot = self._pool.find(place.plugin, place.org_id)
        servers = slot.worker.mcp_servers if slot and slot.worker else []
        running = [server for server in servers if server.state == "running"]
        local = [{"id": server.id} for server in running if server.kind != "external"]
        external = [{"id": server.id, "url": server.url} for server in running if server.kind == "external"]
        return Answer(200, {**metadata, "mcp": {"local": local, "external": external}})

    async def _health(self, place: Place, _body: bytes, _actor: str) -> Answer:
        plugin = place.plugin
        slot = self._pool.find(plugin, place.org_id)
        worker = slot.worker if slot else None
        state = slot.state if slot else WorkerState.STOPPED
        version = worker.version if worker else plugin.current
        degraded = worker.lifecycle.why if worker is not None and state is WorkerState.DEGRADED else ""
        error = degraded or (slot.last_error if slot else "") or plugin.error or place.installation.problem
        if version is None:
            state, error = WorkerState.ERROR, plugin.error
        body = {
            "status": state.health,
            "state": state.label,
            "uptime": round(time.time() - worker.lifecycle.since, 3) if worker and state.serving else 0,
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "pid": worker.pid if worker else None,
            "orgId": place.org_id,
            "plugin": plugin.name,
            "version": (version.manifest if version else plugin.manifest).version,
            "mcpServers": _mcp_servers(worker.mcp_servers if worker else []),
            "memory": worker.memory() if worker else {"rss": None, "pss": None},
            "isolation": version.level.label if version else self._pool.isolation.level.label,
            "sharing": "strict" if version and version.strict else "fork",
            "lastError": error or None,
        }
        if version and version.strict:
            body["sharingReason"] = version.strict_reason
        return Answer(503 if state.health == "unhealthy" else 200, body)

    async def _validate_auth(self, place: Place, body: bytes, _actor: str) -> Answer:
        refused = Answer(400, {"valid": False, "error": "Invalid auth state format"})
        try:
            request = _settings_object(body)
            auth = msgspec.convert(request.get("authState"), Auth)
            config = msgspec.convert(request.get("config"), dict[str, Any] | None)
        except msgspec.ValidationError:
            return refused
        self._loaded(place)  # or nobody could say what its hook does
        return Answer(200, {"valid": await self._management.validate_auth(place.plugin, place.org_id, auth, config)})

    async def _config_update(self, place: Place, body: bytes, actor: str) -> Answer:
        config = _settings_object(body).get("config")
        if not isinstance(config, dict):
            return Answer(400, {"success": False, "error": "Config object required"})
        try:
            change = Change(config, new_org=True)  # in test mode, there may be orgs that the store does not have
            await self._management.put(place.plugin, place.org_id, change, actor=actor, installed=True)
        except InvalidError as error:
            return Answer(400, {"success": False, "error": str(error)})
        return Answer(200, {"success": True})

    async def _disable(self, place: Place, _body: bytes, actor: str) -> Answer:
        try:
            change = Change(enabled=False, new_org=True)
            await self._management.put(place.plugin, place.org_id, change, actor=actor, installed=True)
        except NotFoundError:
            pass
        return Answer(200, {"success": True})

    def _list_tools(self, exchange: Exchange, place: Place, lists: ToolLists) -> None:
        if "mcp" not in place.plugin.manifest.capabilities:
            exchange.answer(Answer(200, {"tools": []}))
        else:
            body = b"" if lists == ToolLists() else msgspec.json.encode([f"{place.plugin.name}__", *lists.expressions])
            exchange.to_runtime(self._pool.slot(place.plugin, place.org_id), wire.LIST_TOOLS, body)

    def _call_tool(self, exchange: Exchange, place: Place, body: bytes, lists: ToolLists) -> None:
        try:
            call = _json_object(body)
            name, arguments = call.get("toolName"), call.get("arguments")
            if not isinstance(name, str) or not name:
                raise RequestError("Tool name required", status=400)
            if arguments is not None and not isinstance(arguments, dict):
                raise RequestError("arguments must be an object", status=400)
            exchange.when_closed = lambda: self._mcp.called(exchange, place.plugin.name, place.org_id, name)
            if "mcp" not in place.plugin.manifest.capabilities or not lists.allows(place.plugin.name, name):
                raise RequestError(f"No MCP server found for tool: {name}", status=404)
        except RequestError as error:
            exchange.refuse(error)
            return
        exchange.to_runtime(self._pool.slot(place.plugin, place.org_id), wire.CALL_TOOL, body)


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise RequestError("The body is not valid JSON", status=400) from None
    if not isinstance(value, dict):
        raise RequestError("The body must be a JSON object", status=400)
    return value


def _settings_object(body: bytes) -> dict[str, Any]:
    """As ``_json_object``, of what is kept or shown to hooks: as strictly as in the management API."""
    try:
        value = read_json(body)
    except RequestError as error:
        if error.status != 400:
            raise
        value = None
    return value if isinstance(value, dict) else {}


def _mcp_servers(servers: list[wire.McpServer]) -> dict[str, Any]:
    """Those that run by id, and of those that do not, why."""
    running = [server.id for server in servers if server.state == "running"]
    others = {
        server.id: {"state": server.state, "error": server.error} for server in servers if server.id not in running
    }
    return {"count": len(running), "servers": running, **({"notRunning": others} if others else {})}
