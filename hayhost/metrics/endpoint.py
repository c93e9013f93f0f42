"""``/metrics``: the library that writes them down is imported, on a thread, when they are asked for."""

import asyncio
import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from hayhost.answers import Answer, Call
from hayhost.catalog import Plugin
from hayhost.errors import RequestError
from hayhost.events import Events
from hayhost.pool import Pool

from .counts import StoreCounts

if TYPE_CHECKING:
    from hayhost.front import Front

__all__ = ["Metrics", "Sources"]


class Sources(NamedTuple):
    """What there is to be told. It is read on a thread, while the loop goes on: copy before you iterate."""

    pool: Pool
    plugins: Mapping[str, Plugin]
    front: "Front"
    events: Events
    store: StoreCounts | None
    refreshes: Mapping[tuple[str, str], int]


class Metrics:
    """Answers ``/metrics``, one request after the other."""

    def __init__(self, sources: Callable[[], Sources]) -> None:
        self._sources = sources
        self._turn = asyncio.Lock()
        self._exposition: Any = None

    async def answer(self, call: Call) -> Answer:
        """All metrics, in the format that the client asks for."""
        if call.principal.org_id is not None:
            raise RequestError("This needs an admin's token", status=403)
        accepted = ",".join(call.headers.get_list("Accept"))
        async with self._turn:
            body, media = await asyncio.to_thread(self._expose, self._sources(), accepted)
        return Answer(200, body, {"Content-Type": media})

    def _expose(self, sources: Sources, accepted: str) -> tuple[bytes, str]:
        if self._exposition is None:
            self._exposition = importlib.import_module("hayhost.metrics.exposition").Exposition()
        found: tuple[bytes, str] = self._exposition.expose(sources, accepted)
        return found
