"""All MCP endpoints of a host. It is imported with the official package, when the first request comes."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

from hayhost.catalog import Plugin
from hayhost.errors import StoreError, UnavailableError
from hayhost.pool import Pool
from hayhost.rates import Rates

from .access import Audit, ToolPolicy
from .endpoint import Endpoint
from .listings import Listings, Shelf
from .requests import Requests

__all__ = ["Hub"]

logging.getLogger("mcp").setLevel(logging.ERROR)  # what is below that is of single requests and sessions

_MOST: Final = 10_000  # endpoints that are kept, one per credential
_TICK: Final = 0.25
_FULL: Final = (
    20  # ticks after which everything is looked at, for what nobody tells: plugins, installations, lists of tools
)
_LINGER: Final = 30.0  # seconds that an endpoint outlives its last session

_Key = tuple[str, str | None, str]


class Hub:
    """Makes endpoints, lets unused ones go, and has their clients told what changes."""

    def __init__(
        self,
        pool: Pool,
        plugins_of: Callable[[str], Awaitable[list[Plugin]]],
        policy: ToolPolicy,
        audit: Audit,
        rates: Rates,
    ) -> None:
        self.settings = pool.settings
        self.policy = policy
        self.audit = audit
        self.rates = rates
        self.listings = Listings(pool, self._changed, self._noticed)
        self.requests = Requests(pool, pool.settings.mcp_requests)
        self._pool = pool
        self._plugins_of = plugins_of
        self._endpoints: OrderedDict[_Key, Endpoint] = OrderedDict()
        self._of: dict[str, set[Endpoint]] = {}
        """The endpoints of each org that has any."""
        self._runs: dict[Endpoint, asyncio.Task[None]] = {}
        self._touched: set[str] = set()  # orgs whose lists may be others
        pool.serves = self.listings.serving
        for worker, slot in pool.lru.items():
            self.listings.serving(worker, slot)
        self._ticker = asyncio.create_task(self._tick())

    async def endpoint(self, org_id: str, plugin: Plugin | None, actor: str) -> Endpoint:
        """The endpoint of an org's servers, of ``plugin`` or of all, for a credential. Raises ``UnavailableError``."""
        key = org_id, plugin.name if plugin else None, actor
        endpoint = self._endpoints.get(key)
        if endpoint is not None and endpoint.plugin is not plugin:
            self._let_go(key)
            endpoint = None
        if endpoint is None:
            if len(self._endpoints) >= _MOST and not self._make_room():
                raise UnavailableError("Too many MCP endpoints are in use")
            endpoint = Endpoint(self, org_id, plugin, actor, partial(self._shelves, org_id, plugin))
            self._endpoints[key] = endpoint
            self._of.setdefault(org_id, set()).add(endpoint)
            self._runs[endpoint] = self._pool.loop.create_task(endpoint.run())
        self._endpoints.move_to_end(key)
        endpoint.active += 1  # it is not let go meanwhile
        try:
            await asyncio.shield(endpoint.started)
        finally:
            endpoint.active -= 1
        return endpoint

    async def _shelves(self, org_id: str, plugin: Plugin | None) -> list[Shelf]:
        having = [plugin] if plugin is not None else await self._plugins_of(org_id)
        return [self.listings.shelf(one, org_id) for one in having if "mcp" in one.manifest.capabilities]

    def _make_room(self) -> bool:
        for key, endpoint in self._endpoints.items():
            if not endpoint.active:
                self._let_go(key)
                return True
        return False

    def _let_go(self, key: _Key) -> None:
        endpoint = self._endpoints.pop(key)
        self._of[endpoint.org_id].discard(endpoint)
        if not self._of[endpoint.org_id]:
            del self._of[endpoint.org_id]
        endpoint.closing.set()
        self._runs[endpoint].add_done_callback(lambda _: self._runs.pop(endpoint, None))

    # ---- what changes

    def _changed(self, shelf: Shelf) -> None:
        self._touched.add(shelf.org_id)

    def _noticed(self, shelf: Shelf, message: dict[str, Any]) -> None:
        for endpoint in self._of.get(shelf.org_id, ()):
            self._pool.spawn(endpoint.notice(shelf, message))

    async def _tick(self) -> None:
        count = 0
        while True:
            await asyncio.sleep(_TICK)
            count += 1
            touched, self._touched = self._touched, set()
            everything = count % _FULL == 0
            now = self._pool.loop.time()
            for key, endpoint in list(self._endpoints.items()):
                if everything or endpoint.org_id in touched:
                    try:
                        await endpoint.tell_changes()
                    except StoreError:
                        self._touched.add(endpoint.org_id)  # again when it can be reached
                if everything:
                    endpoint.prune(now)
                    if endpoint.idle_since < now - self.settings.mcp_session_timeout - _LINGER:
                        self._let_go(key)

    # ---- the end

    def end_streams(self) -> None:
        """End the streams that would go on for ever; requests go on."""
        for endpoint in self._endpoints.values():
            endpoint.end_streams()

    async def close(self) -> None:
        """End everything."""
        self._ticker.cancel()
        for endpoint in self._endpoints.values():
            endpoint.closing.set()
        if self._runs:
            await asyncio.wait(set(self._runs.values()), timeout=5)
