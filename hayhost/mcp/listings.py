"""What the orgs' MCP servers list, kept apart from the workers: asking costs no worker, and starts one only once."""

import asyncio
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from typing import Any, Final

import msgspec

from hayhost.catalog import Plugin
from hayhost.errors import RequestError
from hayhost.logs import get_logger
from hayhost.pool import Pool
from hayhost.slot import Slot
from hayhost.supervisor import Breaker
from hayhost.version import Version
from hayhost.worker import Worker
from sandbox import wire

from .calls import Call, ServerError
from .shape import EMPTY, KEYS, Items, shape

__all__ = ["MODERN", "RETRY", "Listings", "Served", "Shelf"]

MODERN: Final = "2026-07-28"
"""The revision without sessions, in which every request says what the client is."""

RETRY: Final = 5
"""Seconds after which what failed, or was not there, is looked for again."""

_MODERN_META: Final = {
    "io.modelcontextprotocol/protocolVersion": MODERN,
    "io.modelcontextprotocol/clientInfo": {"name": "hayhost", "version": ""},
    "io.modelcontextprotocol/clientCapabilities": {},
}
_MOST: Final = 10_000  # pairs of plugin and org that are remembered
_LIST_TIMEOUT: Final = 5.0  # for one list of one server
_START_TIMEOUT: Final = 10.0  # for servers that still start when their worker is ready
_PATIENCE: Final = 15.0  # for a first look, worker's start and all; what comes later is told to clients as a change
_DEBOUNCE: Final = 0.1
_CAPABILITY: Final = {"tools/list": "tools", "prompts/list": "prompts"}


class Served:
    """One MCP server of an org, as it was when it was looked at last."""

    def __init__(self, id: str) -> None:
        self.id = id
        self.capabilities: dict[str, Any] = {}
        self.instructions = ""
        self.modern = False
        """Whether it can be asked in the revision without sessions."""
        self.handshake = True
        """Whether it can be asked in the one with."""
        self.timeout: float | None = None
        self.lists: dict[str, Items] = dict.fromkeys(KEYS, EMPTY)
        self.changes = -1

    def describe(self, info: bytes) -> None:
        """Take in what it says of itself; what is malformed counts as not said."""
        try:
            said = msgspec.json.decode(info) if info else {}
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            said = {}
        said = said if isinstance(said, dict) else {}
        capabilities, versions = said.get("capabilities"), said.get("protocolVersions")
        instructions, timeout = said.get("instructions"), said.get("timeout")
        self.capabilities = capabilities if isinstance(capabilities, dict) else {}
        self.instructions = instructions if isinstance(instructions, str) else ""
        versions = versions if isinstance(versions, list) else []
        self.modern, self.handshake = MODERN in versions, any(version != MODERN for version in versions) or not versions
        self.timeout = float(timeout) if isinstance(timeout, int | float) and 0 < timeout < 86_400 else None


class Shelf:
    """The MCP servers of one plugin of one org."""

    def __init__(self, plugin: Plugin, org_id: str) -> None:
        self.plugin = plugin
        self.org_id = org_id
        self.servers: dict[str, Served] = {}
        self.breakers: dict[str, Breaker] = {}
        self.version: Version | None = None
        """The version of the plugin whose servers these are; ``None`` before the first look."""
        self.marks = dict.fromkeys(KEYS, 0)
        """Per list, a number that grows when any server's is another."""
        self.problem = ""
        self.wanted: Counter[str] = Counter()
        """Resources whose changes clients want to hear of, and how many do."""
        self.looked = float("-inf")
        self.began = 0.0
        self.refreshing: asyncio.Task[None] | None = None
        self.again = False
        self.news = asyncio.Event()
        """Set when the worker says something new of its servers."""
        self.worker: Worker | None = None

    @property
    def known(self) -> bool:
        """Whether the lists are those of the version that serves."""
        return self.version is not None and self.version is self.plugin.current

    def unwatch(self, uri: str) -> bool:
        """One client less wants to hear of a resource; whether it was the last."""
        self.wanted[uri] -= 1
        if self.wanted[uri] > 0:
            return False
        del self.wanted[uri]
        return True

    def breaker(self, server: str) -> Breaker:
        """The breaker of a server, which stays when its worker goes."""
        return self.breakers.setdefault(server, Breaker())


class Listings:
    """All shelves. ``changed(shelf)`` is called when one has other lists, ``noticed(shelf, message)`` with what a
    server says to all its clients."""

    def __init__(
        self, pool: Pool, changed: Callable[[Shelf], None], noticed: Callable[[Shelf, dict[str, Any]], None]
    ) -> None:
        self._pool = pool
        self._changed = changed
        self._noticed = noticed
        self._shelves: OrderedDict[tuple[str, str], Shelf] = OrderedDict()

    def shelf(self, plugin: Plugin, org_id: str) -> Shelf:
        """The shelf of ``plugin`` for an org, made if there is none."""
        key = plugin.name, org_id
        shelf = self._shelves.get(key)
        if shelf is None or shelf.plugin is not plugin:
            shelf = self._shelves[key] = Shelf(plugin, org_id)
            while len(self._shelves) > _MOST:
                self._shelves.popitem(last=False)
        self._shelves.move_to_end(key)
        return shelf

    async def ensure(self, shelf: Shelf) -> None:
        """Have the lists there, if that does not take long; the org's worker is started only if they were never asked
        for, or are another version's."""
        now = self._pool.loop.time()
        if not shelf.known and (shelf.refreshing is not None or now - shelf.looked > RETRY or not shelf.problem):
            refreshing = shelf.refreshing or self.refresh(shelf)
            await asyncio.wait({refreshing}, timeout=max(0.0, shelf.began + _PATIENCE - now))

    async def look_again(self, shelf: Shelf) -> None:
        """Ask a worker that is there anyway once more: something is missing that a client knows."""
        slot = self._pool.find(shelf.plugin, shelf.org_id)
        if slot is None or slot.worker is None or self._pool.loop.time() - shelf.looked < RETRY:
            return
        for served in shelf.servers.values():
            served.changes = -1
        await asyncio.shield(self.refresh(shelf))

    def refresh(self, shelf: Shelf) -> "asyncio.Task[None]":
        """Read the lists anew, in a task that all who wait share."""
        if shelf.refreshing is None:
            shelf.began = self._pool.loop.time()
            shelf.refreshing = self._pool.spawn(self._refresh(shelf))
        else:
            shelf.again = True
        return shelf.refreshing

    # ---- from workers

    def serving(self, worker: Worker, slot: Slot) -> None:
        """``worker`` serves ``slot`` from now on."""
        worker.mcp_changed = lambda: self._worker_changed(worker, slot)
        worker.mcp_noticed = lambda notice: self._worker_noticed(slot, notice)
        self._worker_changed(worker, slot)

    def _worker_changed(self, worker: Worker, slot: Slot) -> None:
        shelf = self._shelves.get((slot.plugin.name, slot.org_id))
        if shelf is not None and shelf.plugin is slot.plugin and slot.worker is worker:
            shelf.news.set()
            self.refresh(shelf)  # nobody has asked for the others yet

    def _worker_noticed(self, slot: Slot, notice: wire.McpNotice) -> None:
        shelf = self._shelves.get((slot.plugin.name, slot.org_id))
        if shelf is None:
            return
        try:
            message = msgspec.json.decode(notice.notification)
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            return
        if isinstance(message, dict):
            self._noticed(shelf, message)

    # ---- reading lists

    async def _refresh(self, shelf: Shelf) -> None:
        try:
            while True:
                shelf.again = False
                await self._read(shelf)
                if not shelf.again:
                    return
                await asyncio.sleep(_DEBOUNCE)
        finally:
            shelf.refreshing = None

    async def _read(self, shelf: Shelf) -> None:
        slot = self._pool.slot(shelf.plugin, shelf.org_id)
        try:
            worker = slot.worker or await _worker_of(slot)
        except RequestError as error:
            shelf.problem, shelf.looked = error.message, self._pool.loop.time()
            return
        if worker is not shelf.worker:
            shelf.worker = worker
            for served in shelf.servers.values():
                served.changes = -1
        if not shelf.known:
            await _settled(shelf, worker)
        asked = [server for server in worker.mcp_servers if server.state == "running"]
        await asyncio.gather(*(self._read_server(shelf, worker, server) for server in asked))
        if worker.exit.done():  # what it did not come to say is not known
            shelf.problem, shelf.looked = f"The worker died: {worker.exit.result()}", self._pool.loop.time()
            return
        there = {server.id for server in worker.mcp_servers if server.state != "failed"}
        for id in shelf.servers.keys() - there:
            gone = shelf.servers.pop(id)
            for method, items in gone.lists.items():
                shelf.marks[method] += bool(items.entries)
        shelf.version = worker.version
        shelf.problem, shelf.looked = "", self._pool.loop.time()
        self._changed(shelf)

    async def _read_server(self, shelf: Shelf, worker: Worker, server: wire.McpServer) -> None:
        served = shelf.servers.get(server.id)
        if served is not None and served.changes == server.changes:
            return
        if served is None:
            served = Served(server.id)
        served.describe(server.info)
        wanted = [
            method for method in KEYS if isinstance(served.capabilities.get(_CAPABILITY.get(method, "resources")), dict)
        ]
        failed = False
        for method in KEYS:
            items: Items | None = EMPTY
            if method in wanted:
                items = await self._list(shelf, worker, served, method)
            if items is None:  # it goes on with what it had
                failed = True
            elif items.digest != served.lists[method].digest:
                served.lists[method] = items
                shelf.marks[method] += 1
        if shelf.wanted and isinstance(served.capabilities.get("resources"), dict):
            await self._watch(worker, served, shelf.wanted)
        served.changes = -1 if failed else server.changes
        shelf.servers[server.id] = served

    async def _list(self, shelf: Shelf, worker: Worker, served: Served, method: str) -> Items | None:
        where = {"plugin": shelf.plugin.name, "org": shelf.org_id, "server": served.id}
        call = Call({"server": served.id, "method": method, "params": envelope(served)}, "")
        try:
            async with asyncio.timeout(_LIST_TIMEOUT):
                result = await ask(call, worker)
            key = KEYS[method]
            items = await asyncio.to_thread(shape, method, result.get(key))
        except TimeoutError:
            get_logger().warning(f"{method} took more than {_LIST_TIMEOUT:g} s; its entries are left out", **where)
            return None
        except ServerError as error:
            if error.code == -32601:  # it says that it lists such things, and does not
                return EMPTY
            get_logger().warning(
                f"{method} failed; its entries are left out", **where, reason=worker.masked(str(error))[:500]
            )
            return None
        except (RequestError, ValueError, TypeError, RecursionError) as error:
            get_logger().warning(
                f"{method} failed; its entries are left out", **where, reason=worker.masked(str(error))[:500]
            )
            return None
        finally:
            call.close()
        if items.left_out:
            get_logger().warning(f"{method} has entries that cannot be used", **where, entries=items.left_out)
        return items

    def unwatch(self, shelf: Shelf, uri: str) -> None:
        """One client less wants to hear of a resource. If it was the last, the worker's servers are told, if there is
        one."""
        slot = self._pool.find(shelf.plugin, shelf.org_id)
        if shelf.unwatch(uri) and slot is not None and slot.worker is not None:
            for served in shelf.servers.values():
                if isinstance(served.capabilities.get("resources"), dict):
                    self._pool.spawn(self._watch(slot.worker, served, (uri,), "resources/unsubscribe"))

    async def _watch(
        self, worker: Worker, served: Served, uris: Iterable[str], method: str = "resources/subscribe"
    ) -> None:
        """Tell a server that is new which resources clients want to hear of, or one which nobody does any more."""
        for uri in list(uris):
            call = Call({"server": served.id, "method": method, "params": {"uri": uri}}, "")
            try:
                async with asyncio.timeout(_LIST_TIMEOUT):
                    await ask(call, worker)
            except (TimeoutError, ServerError, RequestError):
                pass
            finally:
                call.close()


def envelope(served: Served) -> dict[str, Any]:
    """The params of a request of the host's own to a server."""
    return {} if served.handshake else {"_meta": _MODERN_META}


async def ask(call: Call, worker: Worker) -> dict[str, Any]:
    """The result of ``call``, put to ``worker``; what the server says before that is nobody's."""
    call.begin(worker)
    async for _ in call:
        pass
    assert call.result is not None
    return call.result


class _Arrival:
    """Waits in a slot for a worker, and has nothing for it."""

    trace = None

    def __init__(self) -> None:
        self.worker: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()

    def begin(self, worker: Worker) -> None:
        if not self.worker.done():
            self.worker.set_result(worker)

    def failed(self, error: RequestError) -> None:
        if not self.worker.done():
            self.worker.set_exception(error)


async def _worker_of(slot: Slot) -> Worker:
    """The org's worker, started if there is none. Raises ``RequestError``."""
    arrival = _Arrival()
    slot.submit(arrival)
    try:
        return await arrival.worker
    finally:
        slot.forget(arrival)


async def _settled(shelf: Shelf, worker: Worker) -> None:
    """Wait for servers that still start, though not for ever."""
    try:
        async with asyncio.timeout(_START_TIMEOUT):
            while any(server.state == "starting" for server in worker.mcp_servers) and not worker.exit.done():
                shelf.news.clear()
                await shelf.news.wait()
    except TimeoutError:
        pass
