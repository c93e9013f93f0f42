"""The way from a request to its MCP endpoint. The official package is imported when the first one comes."""

import asyncio
import importlib
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from hayhost.answers import NotYetError
from hayhost.catalog import Plugin
from hayhost.errors import RequestError, StoreError, UnavailableError
from hayhost.exchange import Exchange
from hayhost.installs import ToolLists
from hayhost.logs import get_logger
from hayhost.pool import Pool
from hayhost.rates import Rates

from .access import Audit, Outcome, ToolCall, ToolPolicy
from .asgi import Bridge

if TYPE_CHECKING:
    from .hub import Hub

__all__ = ["METADATA_PATH", "METHODS", "Gateway"]

METHODS: Final = frozenset({"GET", "POST", "DELETE"})
"""The methods of streamable HTTP."""

METADATA_PATH: Final = "/.well-known/oauth-protected-resource"
"""Before an endpoint's own path: where its metadata are (RFC 9728, 3)."""

_OUTCOMES: Final[Mapping[int, Outcome]] = {
    0: "cancelled",
    200: "ok",
    400: "denied",
    404: "denied",
    500: "tool error",
    504: "timeout",
}


class Gateway:
    """Answers the MCP endpoints' requests."""

    def __init__(
        self,
        pool: Pool,
        plugins: Mapping[str, Plugin],
        policy: ToolPolicy,
        audit: Audit,
        rates: Rates,
    ) -> None:
        self._pool = pool
        self._plugins = plugins
        self._policy = policy
        self._audit = audit
        self._rates = rates
        self._hub: asyncio.Task[Hub] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def check(self, org_id: str, plugin: Plugin | None) -> None:
        """Raises ``RequestError`` if the org has no such endpoint, ``NotLoadedError`` if that is not known yet."""
        if plugin is not None:
            if "mcp" not in plugin.manifest.capabilities:
                raise RequestError("The plugin does not declare the capability mcp: it has no MCP servers", status=404)
            return
        found = [self._pool.installs.find(name, org_id) for name in self._plugins]  # all, so that none is unknown
        if not any(installation is not None and installation.enabled for installation in found):
            raise RequestError("There is nothing at this address", status=404)

    async def plugins_of(self, org_id: str) -> list[Plugin]:
        """The plugins that the org has, by name. Raises ``StoreError``."""
        having = []
        for name, plugin in sorted(self._plugins.items()):
            installation = await self._pool.installs.load(name, org_id)
            if installation is not None and installation.enabled:
                having.append(plugin)
        return having

    def tools_of(self, org_id: str) -> ToolLists:
        """Which tools the org's clients may use. Raises ``NotYetError`` if that is not known yet."""
        if (lists := self._policy.known(org_id)) is None:
            raise NotYetError(lambda: self._policy.tool_lists(org_id), "The store is too busy")
        return lists

    def called(self, exchange: Exchange, plugin: str, org_id: str, tool: str) -> None:
        """Keep word of a call of a tool at a worker's own URL, which has been answered, or left."""
        actor = exchange.principal.actor if exchange.principal else ""
        ms = round((self._pool.loop.time() - exchange.started) * 1000, 1)
        outcome = _OUTCOMES.get(exchange.status, "unavailable")
        self._audit.record(ToolCall(org_id, actor, plugin, "", tool, outcome, ms, exchange.id))

    def answer(self, exchange: Exchange, body: bytes, org_id: str, plugin: Plugin | None) -> None:
        """Answer a request to the endpoint of an org's servers: those of ``plugin``, or all."""
        task = self._pool.loop.create_task(self._answer(exchange, body, org_id, plugin))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, exchange: Exchange, body: bytes, org_id: str, plugin: Plugin | None) -> None:
        bridge = Bridge(exchange, body)
        try:
            hub = await self._ready()
            endpoint = await hub.endpoint(org_id, plugin, exchange.principal.actor if exchange.principal else "")
            await endpoint.handle(bridge, exchange.id)
            bridge.finish()
        except RequestError as error:
            exchange.failed(error)
        except StoreError as error:
            exchange.failed(UnavailableError(str(error)))
        except asyncio.CancelledError:
            exchange.failed(UnavailableError("The host is stopping"))
            raise
        except Exception as error:  # a bug of ours: the client learns no more than that
            get_logger().exception("an internal error", request=exchange.id, path=exchange.path, reason=repr(error))
            exchange.failed(RequestError("Internal server error"))

    async def _ready(self) -> "Hub":
        """The endpoints, with the official package, which is imported apart from the loop when it is first needed."""
        if self._hub is None:
            self._hub = self._pool.loop.create_task(self._open())
        return await asyncio.shield(self._hub)

    async def _open(self) -> "Hub":
        began = time.monotonic()
        module = await asyncio.to_thread(importlib.import_module, "hayhost.mcp.hub")
        get_logger().debug("MCP is ready", ms=round((time.monotonic() - began) * 1000))
        hub: Hub = module.Hub(self._pool, self.plugins_of, self._policy, self._audit, self._rates)
        return hub

    def end_streams(self) -> None:
        """The host stops: end the streams that would go on for ever."""
        if self._hub is not None and self._hub.done():
            self._hub.result().end_streams()

    async def close(self) -> None:
        """End everything."""
        for task in self._tasks:
            task.cancel()
        if self._hub is not None:
            self._hub.cancel()
            if self._hub.done() and not self._hub.cancelled():
                await self._hub.result().close()
