"""What runs: plugins, workers, and events as they happen."""

import asyncio
import time
from collections.abc import Mapping
from functools import partial
from heapq import nsmallest
from typing import Final

import msgspec

from hayhost.access import Access
from hayhost.answers import Answer
from hayhost.catalog import Plugin
from hayhost.errors import RequestError
from hayhost.events import Events
from hayhost.metrics.histogram import Latency
from hayhost.metrics.sampling import Sample, sample_all
from hayhost.pool import Pool
from hayhost.reload import rollback
from hayhost.slot import Slot
from hayhost.version import Version

from .operations import Operation, Request
from .views import LoadView, PluginList, PluginView, VersionView, WorkerPage, WorkerQuery, WorkerView

__all__ = ["Running"]

_AT_A_TIME: Final = 50  # workers


class Running:
    """Answers for plugins, workers and events."""

    def __init__(self, pool: Pool, plugins: Mapping[str, Plugin], events: Events, access: Access) -> None:
        self._access = access
        self._pool = pool
        self._plugins = plugins
        self._events = events

    def operations(self) -> list[Operation]:
        """What it answers."""
        one = "/plugins/{name}"
        return [
            Operation("listPlugins", "GET", "/plugins", "List plugins", "any", self._list, {200: PluginList}),
            Operation("getPlugin", "GET", one, "Show a plugin", "any", self._show, {200: PluginView, 404: None}),
            Operation(
                "rollback",
                "POST",
                one + "/rollback",
                "Serve the version before this one",
                "admin",
                self._rollback,
                {200: PluginView, 404: None, 409: None},
                changes_plugin=True,
            ),
            Operation(
                "listWorkers", "GET", "/workers", "List workers", "any", self._workers, {200: WorkerPage}, WorkerQuery
            ),
            Operation(
                "events",
                "GET",
                "/events",
                "Listen to changes of plugins, workers and installations",
                "any",
                self._listen,
                {200: bytes},
                media="text/event-stream",
            ),
        ]

    def _plugin(self, request: Request) -> Plugin:
        plugin = self._plugins.get(request.params["name"])
        if plugin is None:
            raise RequestError("There is no plugin of this name", status=404)
        return plugin

    async def _list(self, request: Request) -> Answer:
        admin = request.call.principal.org_id is None
        items = [self._describe(self._plugins[name], admin) for name in sorted(self._plugins)]
        return Answer(200, PluginList(items=items))

    async def _show(self, request: Request) -> Answer:
        return Answer(200, self._describe(self._plugin(request), request.call.principal.org_id is None))

    async def _rollback(self, request: Request) -> Answer:
        plugin = self._plugin(request)
        await rollback(self._pool, plugin)
        return Answer(200, self._describe(plugin, True))

    def _describe(self, plugin: Plugin, admin: bool) -> PluginView:
        """``plugin`` for an admin; orgs do not learn of the machine and of each other."""
        manifest = plugin.manifest
        count = sum(slot.plugin is plugin and slot.worker is not None for slot in self._pool.slots.values())
        return PluginView(
            name=plugin.name,
            display_name=manifest.display_name,
            category=manifest.category,
            capabilities=list(manifest.capabilities),
            permissions={
                name: value
                for name in ("network", "subprocess", "memory", "cpu_seconds", "processes", "files")
                if (value := getattr(manifest.permissions, name)) is not None
            },
            env=list(manifest.env) if admin else [],
            from_env=_from_env(plugin.current),
            warnings=plugin.current.warnings if plugin.current and admin else [],
            state=plugin.state.value,
            error=plugin.error or None,
            traceback=plugin.traceback or None if admin else None,
            current=_version(plugin.current),
            previous=_version(plugin.previous),
            workers=count if admin else 0,
            metadata=msgspec.to_builtins(plugin.current.metadata) if plugin.current else None,
            history=[msgspec.convert(record, LoadView, from_attributes=True) for record in reversed(plugin.history)]
            if admin
            else [],
        )

    async def _workers(self, request: Request) -> Answer:
        query, principal = request.query, request.call.principal
        if query.org is not None and not principal.may(query.org):
            raise RequestError("The token is good for another organisation only", status=403)
        chosen = (
            (f"{plugin}/{org}", slot)
            for (plugin, org), slot in self._pool.slots.items()
            if principal.may(org) and query.org in (None, org) and query.plugin in (None, plugin)
        )
        after = query.after
        page = nsmallest(query.limit + 1, ((key, slot) for key, slot in chosen if key > after), key=lambda one: one[0])
        following = page[query.limit - 1][0] if len(page) > query.limit else None
        slots = [slot for _, slot in page[: query.limit]]
        pids = [slot.worker.pid for slot in slots if query.memory and slot.worker is not None]
        samples = await self._pool.loop.run_in_executor(None, sample_all, pids) if pids else {}
        now = self._pool.loop.time()
        epoch = time.time() - now
        items = []
        for number, slot in enumerate(slots, 1):
            if number % _AT_A_TIME == 0:
                await asyncio.sleep(0)  # a long page holds up no request
            taken = samples.get(slot.worker.pid, Sample()) if slot.worker is not None else Sample()
            latency = slot.recent.read(now, epoch) if slot.recent is not None else Latency()
            items.append(_describe_worker(slot, taken, latency))
        return Answer(200, WorkerPage(items=items, next=following))

    async def _listen(self, request: Request) -> Answer:
        check = partial(self._access.principal, request.call.headers)
        return Answer(200, self._events.listen(request.call.principal, check), {"Content-Type": "text/event-stream"})


def _from_env(version: Version | None) -> list[str]:
    if version is None:
        return []
    return [name for name, field in version.metadata.config_schema.items() if field.env in version.env]


def _version(version: Version | None) -> VersionView | None:
    if version is None:
        return None
    return VersionView(version=version.manifest.version, digest=version.digest, loaded_at=round(version.loaded_at, 3))


def _describe_worker(slot: Slot, taken: Sample, latency: Latency) -> WorkerView:
    """What an org's plugin is doing."""
    worker = slot.worker
    return WorkerView(
        plugin=slot.plugin.name,
        org=slot.org_id,
        state=slot.state.label,
        since=round(worker.lifecycle.since, 3) if worker is not None else None,
        why=(worker.lifecycle.why or None) if worker is not None else None,
        pid=worker.pid if worker is not None else None,
        version=worker.version.manifest.version if worker is not None else None,
        isolation=worker.version.level.label if worker is not None else None,
        requests=worker.requests if worker is not None else 0,
        in_flight=len(worker.streams) if worker is not None else 0,
        waiting=len(slot.queue),
        restarts=slot.restarts,
        errors=slot.errors,
        latency=latency,
        started_at=round(worker.started_at, 3) if worker is not None else None,
        rss=taken.rss,
        pss=taken.pss,
        private_dirty=taken.private_dirty,
        cpu_seconds=taken.cpu_seconds,
        last_error=slot.last_error or None,
    )
