"""The way from a URL to a worker, and the one place where errors become HTTP."""

import asyncio
import os
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from email.utils import formatdate
from typing import Any, Final

import msgspec
from tornado.http1connection import HTTP1Connection
from tornado.httputil import HTTPHeaders, HTTPMessageDelegate, HTTPServerConnectionDelegate

from sandbox import wire

from . import lifecycle
from .errors import RequestError, UnavailableError
from .exchange import Answer, Exchange, StillLoadingError
from .installs import Auth
from .layout import Layout, Place
from .logs import get_logger
from .pool import Pool
from .routes import HOST_ROUTES, Match
from .settings import Settings
from .states import WorkerState
from .version import Version

__all__ = ["Front"]

_OWN_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
_TICK: Final = 0.25

Host = Callable[[Place, bytes], Awaitable[Answer]]


class Front(HTTPServerConnectionDelegate):
    """Takes each request to where it belongs."""

    def __init__(self, settings: Settings, pool: Pool, layout: Layout, *, access_log: bool = False) -> None:
        self.settings = settings
        self.loop = asyncio.get_running_loop()
        self.open: set[Exchange] = set()
        self.stopping = False
        self._pool = pool
        self._layout = layout
        self._access_log = access_log
        self._due: OrderedDict[Exchange, None] = OrderedDict()  # all have the same limit, so the first is due first
        self._tasks: set[asyncio.Task[None]] = set()
        self._ids = f"{os.urandom(4).hex()}-{{}}".format
        self._count = 0
        self._date = (0, "")
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
        return Exchange(self, request_conn)

    # ---- what exchanges tell

    def wait_for(self, exchange: Exchange) -> None:
        """The request's limit runs from now: the client, a worker or a queue is waited for."""
        self.open.add(exchange)
        exchange.deadline = self.loop.time() + self.settings.request_timeout
        self._due[exchange] = None
        self._due.move_to_end(exchange)
        self.nothing_open.clear()

    def answering(self, exchange: Exchange) -> None:
        """Nobody is waited for just now."""
        self._due.pop(exchange, None)

    def closed(self, exchange: Exchange) -> None:
        """The exchange is over."""
        self._due.pop(exchange, None)
        self.open.discard(exchange)
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

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            now = self.loop.time()
            while self._due:
                exchange = next(iter(self._due))
                if exchange.deadline > now:
                    break
                del self._due[exchange]
                exchange.timed_out()

    def close(self) -> None:
        """Stop the clock."""
        self._ticker.cancel()
        for task in self._tasks:
            task.cancel()

    # ---- routing

    def route(self, exchange: Exchange, headers: HTTPHeaders) -> None:
        """Decide where a request goes.

        Raises ``RequestError`` if it goes nowhere, ``StillLoadingError`` if it can not be known yet.
        """
        if not exchange.path.startswith("/"):
            raise RequestError("The request's target must be a path", status=400)
        if (hosts := len(headers.get_list("Host"))) > 1 or (not hosts and exchange.version == "HTTP/1.1"):
            raise RequestError("A request needs exactly one Host header", status=400)
        own = self._layout.own(exchange.path)
        if own is not None:
            if own.managing:
                self._need_own_origin(headers)
            if self._is_method(exchange, frozenset(own.methods)):
                handler = own.methods["GET" if exchange.method == "HEAD" else exchange.method]
                exchange.to_host(lambda exchange, body: self._spawn(exchange, handler(body)))
            return
        if self.stopping:
            raise UnavailableError("The host is stopping")
        place = self._layout.find(exchange.path)
        if not place.plugin.settled.is_set():
            raise StillLoadingError(place.plugin.settled)
        self._count += 1
        exchange.id = self._ids(self._count)
        exchange.base, exchange.path = place.base, place.path
        method = HOST_ROUTES.get(place.path)
        if method is not None:
            if place.path not in ("/metadata", "/health"):
                self._need_own_origin(headers)
            if self._is_method(exchange, frozenset({method, "HEAD"} if method == "GET" else {method})):
                exchange.to_host(lambda exchange, body: self._answer(exchange, place, body))
            return
        slot = self._pool.find(place.plugin, place.org_id)
        # The org's worker may still be of the version before: what it does not have, it cannot answer.
        version = slot.worker.version if slot is not None and slot.worker is not None else self._loaded(place)
        found = self.match(exchange, version)
        if found is not None:
            exchange.to_plugin(slot or self._pool.slot(place.plugin, place.org_id), found.route, found.params, version)

    def match(self, exchange: Exchange, version: Version) -> Match | None:
        """The route of a request in ``version``; ``None`` if it is answered here. Raises ``RequestError``."""
        found = version.routes.match(exchange.method, exchange.path)
        if isinstance(found, Match):
            return found
        if not found:
            raise RequestError("The plugin has no such route", status=404)
        self._is_method(exchange, found)
        return None

    def _need_own_origin(self, headers: HTTPHeaders) -> None:
        """Refuse what a web page, or a name that was rebound to this machine, makes a browser send."""
        host = headers.get("Host", "")
        origin = headers.get("Origin")
        name = host.rpartition(":")[0] if re.search(r":\d+$", host) else host
        if name.lower() not in {*_OWN_NAMES, self.settings.host.lower()}:
            raise RequestError("This host is managed at its own address only", status=403)
        if (origin is not None and origin.lower() != f"http://{host}".lower()) or (
            headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        ):
            raise RequestError("Requests from other origins are refused", status=403)

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

    def _answer(self, exchange: Exchange, place: Place, body: bytes) -> None:
        if place.path == "/mcp/list-tools":
            self._list_tools(exchange, place)
        elif place.path == "/mcp/call-tool":
            self._call_tool(exchange, place, body)
        else:
            self._spawn(exchange, self._hosts[place.path](place, body))

    def _spawn(self, exchange: Exchange, answer: Awaitable[Answer]) -> None:
        task = self.loop.create_task(self._run(exchange, answer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run(self, exchange: Exchange, answer: Awaitable[Answer]) -> None:
        try:
            exchange.answer(await answer)
        except RequestError as error:
            exchange.refuse(error)
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

    async def _metadata(self, place: Place, _body: bytes) -> Answer:
        metadata = msgspec.to_builtins(self._loaded(place).metadata)
        slot = self._pool.find(place.plugin, place.org_id)
        running = slot.worker.mcp_servers if slot and slot.worker else []
        return Answer(200, {**metadata, "mcp": {"local": [{"id": id} for id in running], "external": []}})

    async def _health(self, place: Place, _body: bytes) -> Answer:
        plugin = place.plugin
        slot = self._pool.find(plugin, place.org_id)
        worker = slot.worker if slot else None
        state = slot.state if slot else WorkerState.STOPPED
        version = worker.version if worker else plugin.current
        degraded = worker.lifecycle.why if worker is not None and state is WorkerState.DEGRADED else ""
        error = degraded or (slot.last_error if slot else "") or plugin.error or place.installation.problem
        if version is None:
            state, error = WorkerState.ERROR, plugin.error
        servers = worker.mcp_servers if worker else []
        body = {
            "status": state.health,
            "state": state.label,
            "uptime": round(time.time() - worker.lifecycle.since, 3) if worker and state.serving else 0,
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "pid": worker.pid if worker else None,
            "orgId": place.org_id,
            "plugin": plugin.name,
            "version": (version.manifest if version else plugin.manifest).version,
            "mcpServers": {"count": len(servers), "servers": servers},
            "memory": _memory(worker.pid if worker else 0),
            "isolation": version.level.label if version else self._pool.isolation.level.label,
            "sharing": "strict" if version and version.strict else "fork",
            "lastError": error or None,
        }
        if version and version.strict:
            body["sharingReason"] = version.strict_reason
        return Answer(503 if state.health == "unhealthy" else 200, body)

    async def _validate_auth(self, place: Place, body: bytes) -> Answer:
        refused = Answer(400, {"valid": False, "error": "Invalid auth state format"})
        try:
            request = _json_object(body)
            auth = msgspec.convert(request.get("authState"), Auth)
            config = msgspec.convert(request.get("config"), dict[str, Any] | None)
        except (RequestError, msgspec.ValidationError):
            return refused
        self._loaded(place)  # or nobody could say what its hook does
        slot = self._pool.slot(place.plugin, place.org_id)
        valid = await lifecycle.validate_auth(self._pool, slot, place.installation, auth, config)
        return Answer(200, {"valid": valid})

    async def _config_update(self, place: Place, body: bytes) -> Answer:
        try:
            config = _json_object(body).get("config")
        except RequestError:
            config = None
        if not isinstance(config, dict):
            return Answer(400, {"success": False, "error": "Config object required"})
        slot = self._pool.slot(place.plugin, place.org_id)
        await lifecycle.update_config(self._pool, slot, place.installation, config)
        return Answer(200, {"success": True})

    async def _disable(self, place: Place, _body: bytes) -> Answer:
        slot = self._pool.slot(place.plugin, place.org_id)
        await lifecycle.disable(self._pool, slot, place.installation)
        return Answer(200, {"success": True})

    def _list_tools(self, exchange: Exchange, place: Place) -> None:
        if "mcp" not in place.plugin.manifest.capabilities:
            exchange.answer(Answer(200, {"tools": []}))
        else:
            exchange.to_runtime(self._pool.slot(place.plugin, place.org_id), wire.LIST_TOOLS, b"")

    def _call_tool(self, exchange: Exchange, place: Place, body: bytes) -> None:
        try:
            call = _json_object(body)
            name, arguments = call.get("toolName"), call.get("arguments")
            if not isinstance(name, str) or not name:
                raise RequestError("Tool name required", status=400)
            if arguments is not None and not isinstance(arguments, dict):
                raise RequestError("arguments must be an object", status=400)
            if "mcp" not in place.plugin.manifest.capabilities:
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


def _memory(pid: int) -> dict[str, int | None]:
    """Resident and proportional set size in bytes, ``None`` where the kernel does not say."""
    sizes: dict[str, int | None] = {"rss": None, "pss": None}
    try:
        with open(f"/proc/{pid}/smaps_rollup", "rb") as file:
            for line in file:
                key = line.partition(b":")[0].decode().lower()
                if key in sizes:
                    sizes[key] = int(line.split()[1]) * 1024
    except OSError:
        pass
    return sizes
