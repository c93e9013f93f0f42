"""Puts a host together: what is started in which order, and stopped in the reverse one."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from tornado.netutil import bind_sockets

from sandbox.confinement import kernel

from .access import Access
from .api import Api
from .catalog import Plugin, load_all
from .errors import HostError, SettingsError
from .events import Events
from .front import Front
from .installs import Installs
from .isolation import Isolation
from .layout import Layout, Site
from .logs import current, get_logger, tell_dropped
from .management import Management
from .manifest import Manifest
from .mcp import CountedAudit, Gateway, LogAudit, NoLists, StoreAudit
from .metrics.endpoint import Metrics, Sources
from .pool import Pool
from .processes import Nursery
from .rates import Rates
from .server import Server, most_connections
from .settings import Settings
from .slot import Slot
from .systemd import Service
from .version import Version

if TYPE_CHECKING:
    from .oauth import Authorizations, Refresher
    from .store import Store
    from .tracing import Tracing

__all__ = ["Host", "PortTakenError", "url_of"]

# Zygotes import in parallel, but no more at once than there are processors to import on.
_LOAD_AT_ONCE: Final = max(2, os.cpu_count() or 1)
_PR_SET_DUMPABLE: Final = 4
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class PortTakenError(HostError):
    """The server could not listen."""

    exit_code = 2


def url_of(host: str, port: int) -> str:
    """The URL of what listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Host:
    """The running parts of ``serve``, ``dev`` and ``run``; an async context manager."""

    def __init__(
        self,
        settings: Settings,
        installs: Installs,
        store: "Store | None" = None,
        service: Service | None = None,
    ) -> None:
        """Without a ``store`` what is changed is kept for as long as the host runs, and nobody needs a token."""
        self.settings = settings
        self.store = store
        self.service = service or Service()
        self.installs = installs
        self._closing = contextlib.AsyncExitStack()
        self.nursery = Nursery(self._nursery_lost)
        self.plugins: dict[str, Plugin] = {}
        self.unserved: dict[Path, list[str]] = {}
        """Folders that look like plugins and are not served, with every reason."""
        self.isolation = Isolation(settings)
        self.isolation.egress.lost = self._cut_off
        self.pool = Pool(settings, installs, self.isolation)
        self.pool.told = self._told
        self.tracing = self.pool.tracing = _tracing(settings)
        self.management = Management(self.pool, trusting=store is None)
        self.management.changed = self._changed
        self.events = Events()
        self.log = current()
        self.access = Access(settings, store.tokens if store is not None else None)
        if store is not None:
            store.installs.changed_elsewhere = self.management.changed_elsewhere
        self._authorizations: Authorizations | None = None
        self._refresher: Refresher | None = None
        if store is not None:
            self._authorizations, self._refresher = self._oauth(store)
        self.rates = Rates(settings)
        policy, audit = (store.tools, StoreAudit(store.audit)) if store is not None else (NoLists(), LogAudit())
        self.mcp = Gateway(self.pool, self.plugins, policy, CountedAudit(audit, self.plugins), self.rates)
        self.stop_hook = "on_stop"
        """The hook that ends workers when the host stops."""
        self.front: Front | None = None
        self.before_stop: Callable[[], Awaitable[None]] | None = None
        """What is to be stopped before the rest."""
        self._server: Server | None = None
        self._stopping = asyncio.Event()
        self._renewals: set[asyncio.Task[None]] = set()
        self._handles_signals = False

    async def __aenter__(self) -> "Host":
        """Start what plugins need. If a signal comes meanwhile it is not all there, and ``is_stopping`` is true."""
        _raise_descriptor_limit()
        _leave_no_core()
        self.service.watch()
        try:
            await self.unless_stopped(self._start())
        except BaseException:
            await self.nursery.stop()
            raise
        return self

    async def _start(self) -> None:
        await self.nursery.start()
        await self.isolation.start(self.nursery)
        self.isolation.log()

    def add(self, manifest: Manifest, *, instrument: bool = False) -> Plugin:
        """Make a plugin known; ``load`` loads it."""
        timeout = self.settings.hook_timeout
        plugin = Plugin(
            manifest,
            self.nursery,
            self.isolation,
            hook_timeout=timeout,
            instrument=instrument,
            tracing=self.settings.tracing,
        )
        plugin.changed = lambda: self.pool.version_changed(plugin)
        plugin.reported = lambda: self._reported(plugin)
        plugin.outdated = lambda: self._update(plugin)
        self.plugins[plugin.name] = plugin
        return plugin

    async def load(self) -> None:
        """Load every plugin; those that do not load are logged and served as errors."""
        await load_all(self.plugins.values(), _LOAD_AT_ONCE)

    def listen(self, layout: Layout, *, access_log: bool = False) -> int:
        """Serve HTTP from now on; the port. Raises ``PortTakenError``."""
        try:
            sockets = list(self.service.sockets) or bind_sockets(
                self.settings.port, self.settings.host, family=socket.AF_UNSPEC, backlog=1024
            )
        except OSError as error:
            raise PortTakenError(
                f"cannot listen on {self.settings.host}:{self.settings.port}: {error.strerror or error}"
            ) from None
        self.front = Front(
            self.settings,
            self.management,
            layout,
            self.access,
            self.mcp,
            self.rates,
            access_log=access_log,
            tracing=self.tracing,
        )
        self._server = Server(self.front, most_connections(self.settings.max_workers))
        self._server.add_sockets(sockets)
        port: int = sockets[0].getsockname()[1]
        return port

    def _oauth(self, store: "Store") -> "tuple[Authorizations, Refresher]":
        from .oauth import Authorizations, Outbound, Provider, Refresher

        nameserver = self.settings.egress_nameserver
        outbound = Outbound(allow=self.settings.egress_allow, nameserver="" if nameserver == "system" else nameserver)
        self._closing.callback(outbound.close)
        provider = Provider(outbound)

        def loaded() -> dict[str, Version]:
            return {name: plugin.current for name, plugin in self.plugins.items() if plugin.current is not None}

        def refreshed(name: str, org: str, reason: str) -> None:
            if (plugin := self.plugins.get(name)) and (slot := self.pool.find(plugin, org)):
                self.pool.spawn(slot.replace(reason))
            self._changed(name, org)

        return Authorizations(store, provider, loaded), Refresher(store, provider, loaded, refreshed)

    async def refresh_tokens(self) -> None:
        """Keep the OAuth2 tokens of all orgs fresh from now on, until the host stops."""
        if self._refresher is not None:
            await self._closing.enter_async_context(self._refresher)

    def site(self) -> Site:
        """The layout of a host that serves many plugins for many orgs."""
        api = Api(
            self.management,
            self.plugins,
            self.events,
            self.access,
            self.log,
            self.store,
            self._authorizations,
            self.unserved,
        )
        metrics = Metrics(lambda: self._sources)
        return Site(self.plugins, self.installs, api, metrics.answer, self.store.ping if self.store else None)

    @property
    def _sources(self) -> Sources:
        assert self.front is not None  # who asks has reached it
        return Sources(
            self.pool,
            self.plugins,
            self.front,
            self.events,
            self.store.counts if self.store is not None else None,
            self._refresher.outcomes if self._refresher is not None else {},
        )

    def _told(self, slot: Slot) -> None:
        state = slot.state.label
        self.installs.note(slot.plugin.name, slot.org_id, state, slot.last_error)
        self.events.publish(
            "worker",
            slot.org_id,
            lambda: {
                "plugin": slot.plugin.name,
                "org": slot.org_id,
                "state": state,
                "pid": slot.worker.pid if slot.worker is not None else None,
                "error": slot.last_error or None,
            },
        )

    def _changed(self, plugin: str, org: str) -> None:
        self.events.publish("installation", org, lambda: {"plugin": plugin, "org": org})

    def _reported(self, plugin: Plugin) -> None:
        self.events.publish(
            "plugin",
            None,
            lambda: {
                "plugin": plugin.name,
                "state": plugin.state.value,
                "version": plugin.current.manifest.version if plugin.current is not None else None,
                "error": plugin.error or None,
            },
        )

    def _update(self, plugin: Plugin) -> None:
        self.pool.spawn(self.pool.update(plugin))

    def _cut_off(self, workers: set[tuple[str, str]]) -> None:
        """Replace workers whose sockets to the egress broker died with it."""
        for name, org in workers:
            if (plugin := self.plugins.get(name)) and (slot := self.pool.find(plugin, org)):
                self.pool.spawn(slot.replace("the egress broker was started anew"))

    def _nursery_lost(self) -> None:
        for plugin in self.plugins.values():  # side by side: one that does not load any more holds up no other
            renewal = self.pool.spawn(self._renew(plugin))
            self._renewals.add(renewal)
            renewal.add_done_callback(self._renewals.discard)

    async def _renew(self, plugin: Plugin) -> None:
        """A new zygote from a new nursery, then new workers from that: the old ones would outlive a killed host."""
        await plugin.renew()
        await self.pool.update(plugin)

    def handle_signals(self, stopping: Callable[[], None] = lambda: None) -> None:
        """Stop on SIGTERM or SIGINT; a second signal while stopping is only warned about."""

        def received(number: int) -> None:
            name = signal.Signals(number).name
            if self._stopping.is_set():
                get_logger().warning(f"{name} ignored: already stopping")
            else:
                get_logger().info(f"{name} received: stopping")
                self._stopping.set()
                self.service.stopping()
                stopping()

        self._handles_signals = True
        for number in _STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, received, number)

    async def stopped(self) -> None:
        """Wait for a signal."""
        await self._stopping.wait()

    async def unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Run ``work``, and cancel it at the first signal; whether it came to its end. Raises what it raises."""
        task, signalled = asyncio.create_task(work), asyncio.create_task(self.stopped())
        await asyncio.wait({task, signalled}, return_when=asyncio.FIRST_COMPLETED)
        signalled.cancel()
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.wait({task})
        return False

    @property
    def is_stopping(self) -> bool:
        """Whether a signal has come."""
        return self._stopping.is_set()

    async def __aexit__(self, *_: object) -> None:
        if self.before_stop is not None:
            await self.before_stop()
        if self._server is not None:
            self._server.stop()
        self.events.close()
        self.log.end_listening()
        if self.front is not None:
            self.front.stopping = True
            self.mcp.end_streams()
            try:
                async with asyncio.timeout(self.settings.drain_timeout):
                    await self.front.nothing_open.wait()
            except TimeoutError:
                get_logger().warning("requests are broken off", requests=len(self.front.open))
        await self._closing.aclose()
        for renewal in self._renewals:
            renewal.cancel()
        await self.pool.close(self.stop_hook)
        await self.mcp.close()
        if self.front is not None:
            self.front.close()
        if self._server is not None:
            await self._server.close_all_connections()
        for plugin in self.plugins.values():
            plugin.close()
        await self.nursery.stop()
        await self.isolation.stop()
        if self.tracing is not None:
            await self.tracing.close()
        self.service.close()
        tell_dropped()
        if self._handles_signals:  # the loop gives up its handlers when it closes: no late signal may end us otherwise
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)


def _tracing(settings: Settings) -> "Tracing | None":
    if not settings.tracing:
        return None
    try:
        from .tracing import Tracing
    except ModuleNotFoundError as error:
        raise SettingsError(f"tracing needs {error.name}: pip install 'hayhost[tracing]'") from None
    return Tracing()


def _raise_descriptor_limit() -> None:
    """Each worker costs the front three descriptors: take as many as the machine gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _leave_no_core() -> None:
    """Orgs' secrets are in this process: none of its memory gets to the disk, nor to others of the same user."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    kernel.prctl(_PR_SET_DUMPABLE, 0)  # the kernel takes no account of that limit if it pipes cores to a program
