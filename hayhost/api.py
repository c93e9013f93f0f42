"""The management API, ``/api/v1``: what a host's operator may ask and order."""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from .catalog import Plugin
from .errors import RequestError
from .exchange import Answer
from .pool import Pool
from .reload import rollback
from .version import Version

__all__ = ["Api", "Handler"]

Handler = Callable[[bytes], Awaitable[Answer]]

_PLUGIN = re.compile(r"/api/v1/plugins/([a-z0-9][a-z0-9-]{0,63})(/rollback)?")


class Api:
    """Finds what answers a path of the API."""

    def __init__(self, plugins: Mapping[str, Plugin], pool: Pool) -> None:
        self._plugins = plugins
        self._pool = pool

    def find(self, path: str) -> dict[str, Handler]:
        """The handlers of ``path`` by method; none if it is not one of the API's."""
        if path == "/api/v1/plugins":
            return {"GET": self._list}
        found = _PLUGIN.fullmatch(path)
        if found is None:
            return {}
        name = found[1]
        if found[2]:
            return {"POST": lambda _body: self._rollback(name)}
        return {"GET": lambda _body: self._show(name)}

    def _plugin(self, name: str) -> Plugin:
        plugin = self._plugins.get(name)
        if plugin is None:
            raise RequestError("There is no plugin of this name", status=404)
        return plugin

    async def _list(self, _body: bytes) -> Answer:
        return Answer(200, {"plugins": [self._describe(plugin) for plugin in self._plugins.values()]})

    async def _show(self, name: str) -> Answer:
        return Answer(200, self._describe(self._plugin(name)))

    async def _rollback(self, name: str) -> Answer:
        plugin = self._plugin(name)
        await rollback(self._pool, plugin)
        return Answer(200, self._describe(plugin))

    def _describe(self, plugin: Plugin) -> dict[str, Any]:
        slots = [slot for slot in self._pool.slots.values() if slot.plugin is plugin and slot.worker is not None]
        return {
            "name": plugin.name,
            "state": plugin.state.value,
            "current": _version(plugin.current),
            "previous": _version(plugin.previous),
            "error": plugin.error or None,
            "traceback": plugin.traceback or None,
            "workers": len(slots),
            "history": [msgspec.to_builtins(record) for record in reversed(plugin.history)],
        }


def _version(version: Version | None) -> dict[str, Any] | None:
    if version is None:
        return None
    return {"version": version.manifest.version, "digest": version.digest, "loadedAt": round(version.loaded_at, 3)}
