"""The store, and a host that listens to nobody, for commands that change what is kept."""

import asyncio
import contextlib
import dataclasses
import os
import pwd
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from hayhost import settings
from hayhost.catalog import BadPlugin, Plugin, find_plugins
from hayhost.errors import HostError, RequestError
from hayhost.host import Host
from hayhost.logs import configure
from hayhost.settings import Settings
from hayhost.store import Store, open_store

from .plugins import plugins_folder

__all__ = ["actor", "bad_line", "hosting", "load", "loaded", "opened", "run"]

T = TypeVar("T")


def actor() -> str:
    """Who runs the command, for the audit log."""
    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:
        return f"cli:{os.getuid()}"


def load(flags: Mapping[str, Any], config: Path | None) -> Settings:
    """The settings, and a log of what goes wrong only. Raises ``SettingsError``."""
    loaded = settings.load(flags, config, log_format="console", log_level="warning")
    configure(loaded.log_format, loaded.log_level)
    return loaded


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command to its end. Raises ``HostError``."""
    try:
        return asyncio.run(work)
    except RequestError as error:
        raise HostError(error.message) from None


def opened(settings: Settings, *, make: bool = False) -> Store:
    """The store, to be entered; with ``make`` there need not be one yet. Raises ``StoreError``."""
    return open_store(settings, make=make, watch=False)


@contextlib.asynccontextmanager
async def hosting(
    settings: Settings, store: Store, folder: Path | None, names: Collection[str]
) -> AsyncIterator[tuple[Host, list[BadPlugin]]]:
    """A host with the named plugins, as far as they are in ``folder``, and the manifests there that are wrong.

    Plugins run as isolated as in ``serve``. Raises ``SettingsError`` if there is no folder.
    """
    manifests, bad = find_plugins(plugins_folder(folder))
    host = Host(dataclasses.replace(settings, spares=0), store.installs, store)
    async with host:
        for manifest in manifests:
            if manifest.name in names:
                host.add(manifest)
        yield host, bad


def bad_line(bad: BadPlugin) -> str:
    """What is wrong with a plugin's manifest."""
    return f"{bad.folder}: {'; '.join(bad.problems)}"


async def loaded(host: Host, name: str, bad: list[BadPlugin], folder: Path | None) -> Plugin:
    """The plugin, loaded. Raises ``HostError`` if it is not there, or ``PluginLoadError``."""
    if (plugin := host.plugins.get(name)) is None:
        where = plugins_folder(folder).absolute()
        raise HostError("\n".join((f"there is no plugin {name} in {where}", *map(bad_line, bad))))
    try:
        await plugin.load()
    except HostError as error:
        raise HostError(
            f"{name} does not load: {plugin.reason}; `hayhost check {plugin.manifest.folder}` shows more"
        ) from error
    return plugin
