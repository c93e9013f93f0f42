"""How URLs lead to orgs' plugins, and to what the host answers itself."""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import msgspec

from .answers import Answer, Call, Handler
from .api import Api
from .catalog import Plugin
from .dashboard import FILES, StaticFile
from .errors import RequestError, StoreError
from .installs import Installation, Installs
from .names import ORG_ID, PLUGIN_NAME

__all__ = ["Layout", "OneOrg", "Own", "Place", "Site"]

_WORKER_URL = re.compile(rf"/plugins/({PLUGIN_NAME.pattern})/({ORG_ID.pattern})(/.*)?", re.DOTALL)
_ORG_URL = re.compile(rf"/orgs/({ORG_ID.pattern})/mcp")


class Place(msgspec.Struct, frozen=True):
    """Where a URL leads: a plugin, an org that has it, and the path below the worker's root."""

    plugin: Plugin
    org_id: str
    installation: Installation
    base: str
    path: str


class Own(msgspec.Struct, frozen=True):
    """A path of the host's own, outside every worker.

    ``route`` is what all paths like it are called. With ``managing`` only the host's own address may be used, and a
    token is needed as soon as there is one, unless it is ``open``. With ``navigation`` a browser may
    be sent there by another site.
    """

    methods: Mapping[str, Handler]
    route: str
    managing: bool = True
    open: bool = False
    navigation: bool = False


class Layout(Protocol):
    """How URLs lead to places."""

    def find(self, path: str) -> Place:
        """The place of ``path``. Raises ``RequestError`` with status 404 if there is none."""
        ...

    def own(self, path: str) -> Own | None:
        """What answers ``path``, if it is the host's own."""
        ...

    def org(self, path: str) -> str | None:
        """The org whose MCP servers are together at ``path``, if it is such a path."""
        ...


class Site:
    """``hayhost serve``: ``/plugins/<name>/<org>/...`` beside the host's own paths."""

    def __init__(
        self,
        plugins: Mapping[str, Plugin],
        installs: Installs,
        api: Api,
        metrics: Handler,
        check: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """``metrics`` answers ``/metrics``. ``check()`` raises ``StoreError`` if the store cannot be reached."""
        self._plugins = plugins
        self._installs = installs
        self._api = api
        self._check = check
        self.ready = False
        self._own = {
            "/healthz": _get(self._healthz, "/healthz"),
            "/readyz": _get(self._readyz, "/readyz"),
            "/metrics": Own(_with_head({"GET": metrics}), "/metrics"),
        }
        self._own |= {path: _page(file, path) for path, file in FILES.items()}

    def find(self, path: str) -> Place:
        found = _WORKER_URL.fullmatch(path)
        plugin = self._plugins.get(found[1]) if found else None
        if found is None or plugin is None:
            raise RequestError("There is nothing at this address", status=404)
        installation = self._installs.find(plugin.name, found[2])
        if installation is None or not installation.enabled:
            raise RequestError("This plugin is not installed for this organisation", status=404)
        return Place(plugin, found[2], installation, f"/plugins/{found[1]}/{found[2]}/", found[3] or "/")

    def own(self, path: str) -> Own | None:
        if path.startswith("/api/"):
            found = self._api.find(path)
            if found is None:
                return None
            return Own(_with_head(found.methods), found.route, open=found.open, navigation=found.navigation)
        return self._own.get(path)

    def org(self, path: str) -> str | None:
        found = _ORG_URL.fullmatch(path)
        return found[1] if found else None

    async def _healthz(self, _call: Call) -> Answer:
        return Answer(200, {"status": "ok"})

    async def _readyz(self, _call: Call) -> Answer:
        states = {name: plugin.state.value for name, plugin in self._plugins.items()}
        if self._check is not None:
            try:
                await self._check()
            except StoreError as error:
                return Answer(503, {"error": str(error), "plugins": states}, {"Retry-After": "1"})
        if self.ready:  # one that is added later does not make the host unready
            return Answer(200, {"status": "ready", "plugins": states})
        return Answer(503, {"error": "The plugins are still loading", "plugins": states}, {"Retry-After": "1"})


class OneOrg:
    """``hayhost run``: one plugin for one org, at the root."""

    def __init__(self, plugin: Plugin, org_id: str, installs: Installs) -> None:
        self._plugin = plugin
        self._org_id = org_id
        self._installs = installs

    def find(self, path: str) -> Place:
        installation = self._installs.find(self._plugin.name, self._org_id)
        assert installation is not None
        return Place(self._plugin, self._org_id, installation, "/", path)

    def own(self, path: str) -> None:
        return None

    def org(self, path: str) -> None:
        return None


def _with_head(methods: Mapping[str, Handler]) -> Mapping[str, Handler]:
    return {**methods, "HEAD": methods["GET"]} if "GET" in methods else methods


def _get(handler: Handler, route: str) -> Own:
    return Own(_with_head({"GET": handler}), route, managing=False)


def _page(file: StaticFile, path: str) -> Own:
    """A file of the dashboard: there is nothing secret in it, but it is the host's own and so are its addresses."""

    async def handle(call: Call) -> Answer:
        return file.answer(call.headers.get("If-None-Match", ""))

    route = path if path == "/" else "/dashboard/{file}"
    return Own(_with_head({"GET": handle}), route, open=True, navigation=path == "/")
