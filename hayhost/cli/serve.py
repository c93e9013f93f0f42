"""``hayhost serve`` and ``hayhost dev``."""

import asyncio
from pathlib import Path

from hayhost.api import Api
from hayhost.catalog import find_plugins
from hayhost.errors import SettingsError
from hayhost.host import Host, check_address, url_of
from hayhost.installs import FileInstalls, Installs, TestInstalls
from hayhost.layout import ORG_ID, Site
from hayhost.logs import configure, get_logger
from hayhost.reload import Reloader
from hayhost.settings import Settings

__all__ = ["serve"]


def serve(plugins_dir: Path, settings: Settings, *, instrument: bool) -> None:
    """Serve until a signal. Raises ``HostError`` if that cannot begin."""
    configure(settings.log_format, settings.log_level)
    check_address(settings.host)
    installs = _installs(settings)
    asyncio.run(_serve(plugins_dir, settings, installs, instrument))


def _installs(settings: Settings) -> Installs:
    if settings.mode == "test":
        if settings.orgs is not None:
            raise SettingsError("--orgs is for production mode: in test mode every org is known")
        return TestInstalls()
    if settings.orgs is None:
        raise SettingsError(
            "production mode has to know its orgs: give --orgs FILE.toml, or --mode test to have every org known"
        )
    return FileInstalls(settings.orgs, ORG_ID.fullmatch)


async def _serve(plugins_dir: Path, settings: Settings, installs: Installs, dev: bool) -> None:
    log = get_logger()
    manifests, bad = find_plugins(plugins_dir)
    for entry in bad:
        for problem in entry.problems:
            log.error("a plugin is not served", folder=entry.folder.name, reason=problem)
    if not manifests:
        log.warning("no plugin to serve; `hayhost new NAME` makes one", folder=str(plugins_dir))
    if isinstance(installs, FileInstalls):
        known = {manifest.name for manifest in manifests}
        for warning in installs.warnings:
            log.warning(warning)
        for plugin, org in installs.all():
            if plugin not in known:
                log.warning("an org has a plugin that is not served", org=org, plugin=plugin)
    host = Host(settings, installs)
    host.handle_signals()
    async with host:
        for manifest in manifests:
            host.add(manifest, instrument=dev)
        site = Site(host.plugins, installs, Api(host.plugins, host.pool))
        port = host.listen(site, access_log=dev)
        url = url_of(settings.host, port)
        log.info("listening", url=url, mode=settings.mode)
        if await host.unless_stopped(host.load()):
            if settings.reload:
                reloader = Reloader(
                    plugins_dir,
                    host.pool,
                    host.plugins,
                    lambda manifest: host.add(manifest, instrument=dev),
                    quiet=settings.debounce,
                    poll=settings.poll,
                )
                host.before_stop = reloader.stop
                reloader.start(bad)
                await host.unless_stopped(reloader.watching())
            site.ready = True
            log.info("ready", plugins=len(host.plugins))
            if dev:
                for name in host.plugins:
                    log.info(f"try {url}/plugins/{name}/my-org/metadata")
        await host.stopped()
