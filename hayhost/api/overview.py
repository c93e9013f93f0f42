"""The host as a whole: what it is, what is wrong with it, and what isolation its machine gives."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from time import time
from typing import TYPE_CHECKING

import msgspec

from hayhost import __version__
from hayhost.access import LOCAL
from hayhost.answers import Answer
from hayhost.catalog import Plugin
from hayhost.doctor import Doctor
from hayhost.pool import Pool
from hayhost.problems import Problems

from .operations import Operation, Request
from .views import DoctorQuery, DoctorView, HostView, ProblemList, ProblemView

if TYPE_CHECKING:
    from hayhost.store import Store

__all__ = ["Overview"]


class Overview:
    """Answers for the host."""

    def __init__(
        self, pool: Pool, plugins: Mapping[str, Plugin], unserved: Mapping[Path, list[str]], store: "Store | None"
    ) -> None:
        self._pool = pool
        self._plugins = plugins
        self._store = store
        self._problems = Problems(pool, plugins, unserved, store)
        self._doctor = Doctor(pool.settings)
        self._started = time()

    def operations(self) -> list[Operation]:
        """What it answers."""
        return [
            Operation("getHost", "GET", "/host", "Show the host, and who asks", "any", self._host, {200: HostView}),
            Operation(
                "listProblems", "GET", "/problems", "List what is wrong now", "any", self._list, {200: ProblemList}
            ),
            Operation(
                "doctor",
                "GET",
                "/doctor",
                "Examine what isolation this machine gives",
                "admin",
                self._examine,
                {200: DoctorView},
                DoctorQuery,
            ),
        ]

    async def _host(self, request: Request) -> Answer:
        principal, settings = request.call.principal, self._pool.settings
        slots = [slot for slot in self._pool.slots.values() if principal.may(slot.org_id)]
        workers = [slot.worker for slot in slots if slot.worker is not None]
        return Answer(
            200,
            HostView(
                version=__version__,
                mode=settings.mode,
                store=self._store is not None,
                open=principal is LOCAL,
                actor=principal.actor,
                org=principal.org_id,
                isolation=self._pool.isolation.level.label,
                started=round(self._started, 3),
                max_workers=settings.max_workers,
                plugins=Counter(plugin.state.value for plugin in self._plugins.values()),
                workers=Counter(slot.state.label for slot in slots),
                requests=sum(slot.requests for slot in slots),
                errors=sum(slot.errors for slot in slots),
                in_flight=sum(len(worker.streams) for worker in workers),
                waiting=sum(len(slot.queue) for slot in slots),
                restarts=sum(slot.restarts for slot in slots),
            ),
        )

    async def _list(self, request: Request) -> Answer:
        found = await self._problems.find(request.call.principal)
        return Answer(
            200, ProblemList(items=[msgspec.convert(one, ProblemView, from_attributes=True) for one in found])
        )

    async def _examine(self, request: Request) -> Answer:
        return Answer(200, msgspec.convert(await self._doctor.report(request.query.max_age), DoctorView))
