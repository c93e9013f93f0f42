"""The plugins of a host: what their manifests and zygotes say, and their zygotes' lives."""

import asyncio
import os
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Final

import msgspec

from sandbox.spec import PluginSpec

from .errors import HostError, ManifestError, PluginLoadError, SettingsError, UnavailableError
from .logs import PluginLog, get_logger
from .manifest import Manifest, is_plugin_folder, read_manifest
from .metadata import Metadata, read_metadata
from .processes import Nursery, Zygote
from .routes import RouteTable

__all__ = ["BadPlugin", "Plugin", "PluginState", "find_plugins", "load_all"]

# A plugin that loads for longer than this waits for something more likely than it works: others may begin.
_SLOW_LOAD: Final = 2.0
_RETRY_FIRST: Final = 0.2
_RETRY_MOST: Final = 10.0


class PluginState(Enum):
    """Whether a plugin can be served."""

    LOADING = "loading"
    READY = "ready"
    ERROR = "error"


class BadPlugin(msgspec.Struct, frozen=True):
    """A folder that looks like a plugin and is not served, with every reason."""

    folder: Path
    problems: list[str]


def find_plugins(directory: Path) -> tuple[list[Manifest], list[BadPlugin]]:
    """Read the manifest of every plugin folder in ``directory``, in order of folder name.

    Raises ``SettingsError`` if the directory cannot be read. One bad manifest never hides the others.
    """
    try:
        folders = sorted(path for path in directory.iterdir() if is_plugin_folder(path))
    except OSError as error:
        raise SettingsError(f"{directory}: cannot be read as a folder of plugins: {error.strerror}") from None
    manifests: dict[str, Manifest] = {}
    bad = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except ManifestError as error:
            bad.append(BadPlugin(folder, error.problems))
            continue
        if (first := manifests.get(manifest.name)) is not None:
            problem = f"{folder.name}: the name {manifest.name!r} is taken by the folder {first.folder.name!r}"
            bad.append(BadPlugin(folder, [f"{problem}, which is served; give one of them another name"]))
        else:
            manifests[manifest.name] = manifest
    return list(manifests.values()), bad


class Plugin:
    """One plugin: its manifest, what it registered, and the zygote that its workers are forked from."""

    def __init__(self, manifest: Manifest, nursery: Nursery, *, hook_timeout: float, instrument: bool = False) -> None:
        self.manifest = manifest
        self.state = PluginState.LOADING
        self.error = ""
        self.metadata = Metadata()
        self.warnings: list[str] = list(manifest.warnings)
        self.hooks: frozenset[str] = frozenset()
        self.routes = RouteTable()
        self.env: dict[str, str] = {}
        self.strict_reason = ""
        """Why its workers are not forked from one zygote; empty if they are."""
        self.zygote: Zygote | None = None
        self.retired: list[Zygote] = []
        self.log = PluginLog(plugin=manifest.name, version=manifest.version)
        self.settled = asyncio.Event()
        """Set once the first load has succeeded or failed."""
        self.changed: Callable[[], None] = lambda: None
        """Called when a new zygote is ready."""
        self._spec = PluginSpec(
            folder=str(manifest.folder),
            entry=manifest.entry,
            attribute=manifest.attribute,
            name=manifest.name,
            version=manifest.version,
            capabilities=manifest.capabilities,
            env=manifest.env,
            hook_timeout=hook_timeout,
            instrument=instrument,
        )
        self._nursery = nursery
        self._loading: asyncio.Task[Zygote] | None = None
        self._closed = False

    @property
    def name(self) -> str:
        """Its id in URLs."""
        return self.manifest.name

    @property
    def strict(self) -> bool:
        """Whether each of its workers loads the plugin for itself."""
        return bool(self.strict_reason)

    async def load(self) -> None:
        """Load it. Raises ``PluginLoadError``, after which ``error`` says why."""
        try:
            zygote = await self.spawn()
        except HostError as error:
            self.state, self.error = PluginState.ERROR, str(error)
            raise
        else:
            self._adopt(zygote)
        finally:
            self.settled.set()

    async def spawn(self) -> Zygote:
        """A zygote that has loaded the plugin. Raises ``PluginLoadError`` or ``HostError``."""
        while True:
            zygote = await self._nursery.spawn(self._spec, self.log)
            try:
                loaded = await zygote.loaded
                metadata = read_metadata(loaded.metadata, self.manifest)
            except BaseException:
                zygote.kill()
                raise
            if zygote.nursery == self._nursery.pid:
                break
            zygote.kill()  # its nursery has died meanwhile: nobody would end it with the host
        self.metadata = metadata
        self.warnings = [*self.manifest.warnings, *loaded.warnings]
        self.hooks = frozenset(loaded.hooks)
        self.routes = RouteTable((route.method, route.path) for route in metadata.routes)
        named = {field.env for field in metadata.config_schema.values() if isinstance(field.env, str)}
        self.env = {}
        for name in sorted(named & os.environ.keys()):
            text = os.environ[name]
            if text == text.encode(errors="replace").decode():
                self.env[name] = text
            else:  # bytes that are no UTF-8
                self.warnings.append(f"environment variable {name} is not UTF-8 text and counts as unset")
        if loaded.threads > 1:
            self.strict_reason = (
                f"its import left {loaded.threads - 1} thread(s) running, and a process with threads cannot be forked"
            )
        return zygote

    def _adopt(self, zygote: Zygote) -> None:
        self.zygote = zygote
        self.state, self.error = PluginState.READY, ""
        zygote.lost = lambda: self._lost(zygote)
        self.changed()

    def _lost(self, zygote: Zygote) -> None:
        if zygote is self.zygote and not self._closed:
            get_logger().warning("the plugin's zygote died; starting it anew", plugin=self.name)
            self.zygote = None
            self._begin_loading()

    def _begin_loading(self) -> "asyncio.Task[Zygote]":
        if self._loading is None or self._loading.done():
            self._loading = asyncio.get_running_loop().create_task(self._reload())
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._loading

    async def _reload(self) -> Zygote:
        delay = _RETRY_FIRST
        while True:
            started = time.monotonic()
            try:
                zygote = await self.spawn()
            except HostError as error:
                self.error = str(error)
                get_logger().error("the plugin did not load again", plugin=self.name, reason=str(error))
                await asyncio.sleep(max(0.0, delay - (time.monotonic() - started)))
                delay = min(_RETRY_MOST, delay * 2)
            else:
                self._adopt(zygote)
                return zygote

    async def ready_zygote(self) -> Zygote:
        """Its zygote, waited for while it is started anew. Raises ``UnavailableError`` if it did not load."""
        if self.zygote is not None and self.zygote.alive:
            return self.zygote
        if self.state is not PluginState.READY:
            raise UnavailableError(f"The plugin {self.name} is not loaded: {self.error.splitlines()[0]}", 5)
        return await asyncio.shield(self._begin_loading())

    async def renew(self) -> None:
        """Start another zygote in place of this one, whose workers live on."""
        if self.zygote is not None:
            old, self.zygote = self.zygote, None
            self.retired.append(old)
            await self._begin_loading()

    def retire(self) -> None:
        """Close the zygotes that ``renew`` replaced."""
        while self.retired:
            self.retired.pop().close()

    def close(self) -> None:
        """Let its zygotes exit. Closing twice is safe."""
        self._closed = True
        if self._loading:
            self._loading.cancel()
        self.retire()
        if self.zygote:
            self.zygote.close()


async def load_all(plugins: Iterable[Plugin], at_once: int) -> None:
    """Load plugins side by side, logging each that does not load. A slow one does not hold up those after it."""
    limit = asyncio.Semaphore(at_once)

    async def load(plugin: Plugin) -> None:
        async with limit:
            loading = asyncio.create_task(_load(plugin))
            try:
                await asyncio.wait({loading}, timeout=_SLOW_LOAD)
            except asyncio.CancelledError:
                loading.cancel()
                raise
        await loading

    await asyncio.gather(*(load(plugin) for plugin in plugins))


async def _load(plugin: Plugin) -> None:
    try:
        await plugin.load()
    except HostError as error:
        extra = {"traceback": error.traceback} if isinstance(error, PluginLoadError) and error.traceback else {}
        get_logger().error("the plugin did not load", plugin=plugin.name, reason=str(error), **extra)
    else:
        get_logger().info(
            "plugin loaded",
            plugin=plugin.name,
            version=plugin.manifest.version,
            routes=len(plugin.metadata.routes),
            sharing="strict" if plugin.strict else "fork",
        )
    for warning in plugin.warnings:
        get_logger().warning(warning, plugin=plugin.name)
