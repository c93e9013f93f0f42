"""Puts a host together: what is started in which order, and stopped in the reverse one."""

import asyncio
import os
import resource
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from ipaddress import ip_address
from typing import Any, Final

from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets

from .catalog import Plugin, load_all
from .errors import HostError
from .front import Front
from .installs import Installs
from .isolation import Isolation
from .layout import Layout
from .logs import get_logger
from .manifest import Manifest
from .pool import Pool
from .processes import Nursery
from .settings import Settings

__all__ = ["Host", "PortTakenError", "check_address", "url_of"]

# Zygotes import in parallel, but no more at once than there are processors to import on.
_LOAD_AT_ONCE: Final = max(2, os.cpu_count() or 1)
# An idle keep-alive connection, or one that takes its time over the headers, is closed after this long.
_IDLE_CONNECTION: Final = 75.0
_MAX_HEADER: Final = 64 << 10
_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)


class PortTakenError(HostError):
    """The server could not listen."""

    exit_code = 2


def url_of(host: str, port: int) -> str:
    """The URL of what listens there."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_address(host: str) -> None:
    """Raises ``HostError`` unless ``host`` is a loopback address: anyone who reaches the host can manage it."""
    try:
        loopback = host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise HostError(
            f"{host} is not a loopback address, and anyone who reaches the host could manage its plugins. "
            "Listen on 127.0.0.1 and put a reverse proxy with access control in front"
        )


class Host:
    """The running parts of ``serve``, ``dev`` and ``run``; an async context manager."""

    def __init__(self, settings: Settings, installs: Installs) -> None:
        self.settings = settings
        self.installs = installs
        self.nursery = Nursery(self._nursery_lost)
        self.plugins: dict[str, Plugin] = {}
        self.isolation = Isolation(settings)
        self.isolation.cut_off = self._cut_off
        self.pool = Pool(settings, installs, self.isolation)
        self.stop_hook = "on_stop"
        """The hook that ends workers when the host stops."""
        self.front: Front | None = None
        self.before_stop: Callable[[], Awaitable[None]] | None = None
        """What is to be stopped before the rest."""
        self._server: HTTPServer | None = None
        self._stopping = asyncio.Event()
        self._renewals: set[asyncio.Task[None]] = set()
        self._handles_signals = False

    async def __aenter__(self) -> "Host":
        _raise_descriptor_limit()
        await self.nursery.start()
        try:
            await self.isolation.start(self.nursery)
        except BaseException:
            await self.nursery.stop()
            raise
        self.isolation.log()
        return self

    def add(self, manifest: Manifest, *, instrument: bool = False) -> Plugin:
        """Make a plugin known; ``load`` loads it."""
        timeout = self.settings.hook_timeout
        plugin = Plugin(manifest, self.nursery, self.isolation, hook_timeout=timeout, instrument=instrument)
        plugin.changed = lambda: self.pool.version_changed(plugin)
        plugin.outdated = lambda: self._update(plugin)
        self.plugins[plugin.name] = plugin
        return plugin

    async def load(self) -> None:
        """Load every plugin; those that do not load are logged and served as errors."""
        await load_all(self.plugins.values(), _LOAD_AT_ONCE)

    def listen(self, layout: Layout, *, access_log: bool = False) -> int:
        """Serve HTTP from now on; the port. Raises ``PortTakenError``."""
        check_address(self.settings.host)
        try:
            sockets = bind_sockets(self.settings.port, self.settings.host, family=socket.AF_UNSPEC, backlog=1024)
        except OSError as error:
            raise PortTakenError(
                f"cannot listen on {self.settings.host}:{self.settings.port}: {error.strerror or error}"
            ) from None
        self.front = Front(self.settings, self.pool, layout, access_log=access_log)
        self._server = HTTPServer(
            self.front,
            no_keep_alive=False,
            max_header_size=_MAX_HEADER,
            idle_connection_timeout=_IDLE_CONNECTION,
            max_body_size=1 << 62,  # the front has its own limit, and answers 413 where this one would hang up
        )
        self._server.add_sockets(sockets)
        port: int = sockets[0].getsockname()[1]
        return port

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
        if self.front is not None:
            self.front.stopping = True
            try:
                async with asyncio.timeout(self.settings.drain_timeout):
                    await self.front.nothing_open.wait()
            except TimeoutError:
                get_logger().warning("requests are broken off", requests=len(self.front.open))
        for renewal in self._renewals:
            renewal.cancel()
        await self.pool.close(self.stop_hook)
        if self.front is not None:
            self.front.close()
        if self._server is not None:
            await self._server.close_all_connections()
        for plugin in self.plugins.values():
            plugin.close()
        await self.nursery.stop()
        await self.isolation.stop()
        if self._handles_signals:  # the loop gives up its handlers when it closes: no late signal may end us otherwise
            signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)


def _raise_descriptor_limit() -> None:
    """Each worker costs the front three descriptors: take as many as the machine gives."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
