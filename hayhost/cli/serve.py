"""``hayhost serve`` and ``hayhost dev``."""

import asyncio
import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hayhost.access import is_loopback
from hayhost.catalog import PluginState, find_plugins
from hayhost.declared import Declared, apply, read_declared
from hayhost.errors import HostError, SettingsError
from hayhost.host import Host, url_of
from hayhost.installs import EveryOrg, Installs, TestInstalls
from hayhost.layout import Site
from hayhost.logs import configure_log, get_logger
from hayhost.reload import Reloader
from hayhost.settings import Settings
from hayhost.systemd import Service

if TYPE_CHECKING:
    from hayhost.store import Store

__all__ = ["serve"]


def serve(plugins_dir: Path, settings: Settings, *, instrument: bool, dry_run: bool = False) -> None:
    """Serve until a signal. Raises ``HostError`` if that cannot begin.

    With ``dry_run`` only say what ``settings.orgs`` would change in the store.
    """
    configure_log(settings)
    service = Service.from_environment()
    if service.sockets:  # where they listen decides who may come, and one that all can reach counts
        address = min((sock.getsockname() for sock in service.sockets), key=lambda name: is_loopback(name[0]))
        settings = dataclasses.replace(settings, host=address[0], port=address[1])
    declared = None
    if settings.orgs is not None:
        if settings.mode == "test":
            raise SettingsError("--orgs is for production mode: in test mode every org is known")
        declared = read_declared(settings.orgs)
    elif dry_run:
        raise SettingsError("--dry-run is for --orgs FILE: it says what that would change")
    asyncio.run(_open_and_serve(plugins_dir, settings, service, declared, instrument, dry_run))


async def _open_and_serve(
    plugins_dir: Path, settings: Settings, service: Service, declared: Declared | None, dev: bool, dry_run: bool
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        store: Store | None = None
        if settings.mode == "production" or settings.store != "auto":
            from hayhost.store import open_store

            store = await stack.enter_async_context(open_store(settings))
        installs: Installs = TestInstalls()
        if store is not None:
            installs = EveryOrg(store.installs) if settings.mode == "test" else store.installs
        host = Host(settings, installs, store, service)
        await _serve(plugins_dir, settings, host, declared, dev, dry_run)


async def _serve(
    plugins_dir: Path, settings: Settings, host: Host, declared: Declared | None, dev: bool, dry_run: bool
) -> None:
    await host.access.check_listening()
    log = get_logger()
    manifests, bad = find_plugins(plugins_dir)
    for entry in bad:
        host.unserved[entry.folder] = entry.problems
        for problem in entry.problems:
            log.error("a plugin is not served", folder=entry.folder.name, reason=problem)
    if not manifests:
        log.warning("no plugin to serve; `hayhost new NAME` makes one", folder=str(plugins_dir))
    host.handle_signals()
    async with host:
        if host.is_stopping:
            return
        for manifest in manifests:
            host.add(manifest, instrument=dev)
        if dry_run:
            assert declared is not None
            if await host.unless_stopped(host.load()):
                await _compare(host, declared)
            return
        site = host.site()
        port = host.listen(site, access_log=dev)
        url = url_of(settings.host, port)
        log.info("listening", url=url, mode=settings.mode)
        host.service.loading(len(manifests))
        if await host.unless_stopped(_prepare(host, declared)):
            if settings.reload:
                reloader = Reloader(
                    plugins_dir,
                    host.pool,
                    host.plugins,
                    lambda manifest: host.add(manifest, instrument=dev),
                    unserved=host.unserved,
                    quiet=settings.debounce,
                    poll=settings.poll,
                )
                host.before_stop = reloader.stop
                reloader.start()
                await host.unless_stopped(reloader.watching())
            _is_ready(host, site, url, dev)
        await host.stopped()


async def _prepare(host: Host, declared: Declared | None) -> None:
    await host.load()
    await host.refresh_tokens()
    if declared is None or host.store is None:
        return
    for warning in declared.warnings:
        get_logger().warning(warning)
    report = await apply(declared, host.store, host.management, host.plugins, actor="orgs file")
    for change in report.changes:
        get_logger().info(f"orgs: {change}")
    for problem in report.problems:
        get_logger().error("orgs: not as declared", reason=problem)


async def _compare(host: Host, declared: Declared) -> None:
    assert host.store is not None
    report = await apply(declared, host.store, host.management, host.plugins, actor="orgs file", dry_run=True)
    for change in report.changes:
        click.echo(change)
    if report.problems:
        raise HostError("\n".join(report.problems))
    if not report.changes:
        click.echo("nothing to change")


def _is_ready(host: Host, site: Site, url: str, dev: bool) -> None:
    site.ready = True
    get_logger().info("ready", plugins=len(host.plugins))
    served = sum(plugin.state is PluginState.READY for plugin in host.plugins.values())
    host.service.ready(f"Serving {served} of {len(host.plugins)} plugins at {url}")
    if dev:
        for name in host.plugins:
            get_logger().info(f"try {url}/plugins/{name}/my-org/metadata")
