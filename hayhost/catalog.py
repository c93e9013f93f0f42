"""The plugins of a host: what their manifests and zygotes say, and their zygotes' lives."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path
from typing import Final

import msgspec

from .digest import Digests
from .errors import HostError, ManifestError, PluginLoadError, SettingsError, UnavailableError
from .logs import PluginLog, get_logger
from .manifest import Manifest, is_plugin_folder, read_manifest
from .processes import Nursery
from .version import Version, load_version, spec_of

__all__ = ["BadPlugin", "LoadRecord", "Plugin", "PluginState", "find_plugins", "load_all"]

_RETRY_FIRST: Final = 0.2
_RETRY_MOST: Final = 10.0
_HISTORY: Final = 20


class PluginState(Enum):
    """Whether a plugin can be served."""

    LOADING = "loading"
    READY = "ready"
    ERROR = "error"


class LoadRecord(msgspec.Struct, frozen=True):
    """One attempt to load or exchange a version. ``at`` is in seconds since the epoch, ``ms`` what it took."""

    at: float
    action: str
    digest: str
    version: str
    ms: float
    error: str = ""
    changes: list[str] = []


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
    """One plugin of the host: the version that serves, the one before it, and how its loads went."""

    def __init__(self, manifest: Manifest, nursery: Nursery, *, hook_timeout: float, instrument: bool = False) -> None:
        self.name = manifest.name
        """Its id in URLs."""
        self.manifest = manifest
        """As last read; that of the version that serves is ``current.manifest``."""
        self.current: Version | None = None
        self.previous: Version | None = None
        """The version that served before, its zygote alive, for a rollback."""
        self.error = ""
        """Why the content on the disk is not what serves; empty if it is."""
        self.traceback = ""
        self.seen = ""
        """The digest of the content that was last tried, whether it loaded or not."""
        self.history: deque[LoadRecord] = deque(maxlen=_HISTORY)
        self.settled = asyncio.Event()
        """Set once the first load has succeeded or failed."""
        self.changed: Callable[[Version | None, Version], None] = lambda old, new: None
        """Called with the old and the new version when another one serves."""
        self.log = PluginLog(plugin=manifest.name)
        self._nursery = nursery
        self._hook_timeout = hook_timeout
        self._instrument = instrument
        self._digests = Digests()
        self._respawning: asyncio.Task[Version] | None = None
        self._closed = False

    @property
    def state(self) -> PluginState:
        """Whether it can be served."""
        if self.current is not None:
            return PluginState.READY
        return PluginState.ERROR if self.settled.is_set() else PluginState.LOADING

    def digest(self) -> "asyncio.Future[str]":
        """The digest of the folder's content now, read on a thread."""
        return asyncio.get_running_loop().run_in_executor(None, self._digests.of, self.manifest.folder)

    async def load(self) -> None:
        """Load it for the first time. Raises ``PluginLoadError``, after which ``error`` says why."""
        started = time.monotonic()
        try:
            version = await self.load_version(self.manifest, await self.digest())
        except HostError as error:
            self.failed("load", error, started)
            raise
        else:
            self.serve(version, "load", started)
        finally:
            self.settled.set()

    async def load_version(self, manifest: Manifest, digest: str) -> Version:
        """A version of its own of the content that is in the folder now. Raises as ``hayhost.version.load_version``."""
        self.seen = digest
        spec = spec_of(manifest, hook_timeout=self._hook_timeout, instrument=self._instrument)
        return await load_version(self._nursery, manifest, digest, spec, self.log)

    def failed(self, action: str, error: HostError, started: float) -> None:
        """Keep why a load failed; what served goes on serving."""
        self.error = str(error)
        self.traceback = error.traceback if isinstance(error, PluginLoadError) else ""
        took = (time.monotonic() - started) * 1000
        self.history.append(LoadRecord(time.time(), action, self.seen, self.manifest.version, took, self.error))

    def serve(self, version: Version, action: str, started: float, changes: list[str] | None = None) -> None:
        """Let ``version`` serve from now on."""
        old, self.current = self.current, version
        self.manifest = version.manifest
        self.error = self.traceback = ""
        self.log.bind(version=version.manifest.version)
        version.zygote.lost = lambda: self._lost(version)
        took = (time.monotonic() - started) * 1000
        self.history.append(
            LoadRecord(time.time(), action, version.digest, version.manifest.version, took, changes=changes or [])
        )
        self.changed(old, version)

    def keep(self, version: Version) -> None:
        """Keep ``version``, which served until now, for a rollback, and let go of the one before it."""
        if self.previous is not None and self.previous is not version:
            self.previous.close()
        self.previous = version

    def _lost(self, version: Version) -> None:
        if self._closed:
            return
        if version is self.previous:
            self.previous = None
        elif version is self.current:
            get_logger().warning("the plugin's zygote died; starting it anew", plugin=self.name)
            self._respawn()

    def _respawn(self) -> "asyncio.Task[Version]":
        if self._respawning is None or self._respawning.done():
            self._respawning = asyncio.get_running_loop().create_task(self._load_again())
            self._respawning.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self._respawning

    async def _load_again(self) -> Version:
        delay = _RETRY_FIRST
        while True:
            started = time.monotonic()
            before = self.current
            try:
                version = await self.load_version(self.manifest, await self.digest())
            except HostError as error:
                self.failed("restart", error, started)
                get_logger().error("the plugin did not load again", plugin=self.name, reason=str(error))
                await asyncio.sleep(max(0.0, delay - (time.monotonic() - started)))
                delay = min(_RETRY_MOST, delay * 2)
                continue
            if self.current is not before and self.current is not None and self.current.alive:
                version.close()  # a reload came first
                return self.current
            self.serve(version, "restart", started)
            return version

    async def ready_version(self) -> Version:
        """The version that serves, waited for while its zygote is started anew.

        Raises ``UnavailableError`` if the plugin did not load.
        """
        if self.current is None:
            raise UnavailableError(f"The plugin {self.name} is not loaded: {self.reason}", 5)
        return self.current if self.current.alive else await asyncio.shield(self._respawn())

    async def twin(self, version: Version) -> Version:
        """Another zygote of ``version``, for a worker that is not to be forked.

        Raises ``UnavailableError`` if the folder has other content by now, or ``HostError`` if it does not load.
        """
        if await self.digest() != version.digest:
            raise UnavailableError(f"The files of the plugin {self.name} have changed since it was loaded", 5)
        spec = spec_of(version.manifest, hook_timeout=self._hook_timeout, instrument=self._instrument)
        return await load_version(self._nursery, version.manifest, version.digest, spec, self.log)

    @property
    def reason(self) -> str:
        """One line on why it is not served."""
        return self.error.partition("\n")[0] or "it is still loading"

    async def renew(self) -> None:
        """Start another zygote in place of the one that serves, whose workers live on."""
        if (old := self.current) is not None and old.alive:
            old.zygote.lost = lambda: None
            old.close()
            await self._respawn()

    def close(self) -> None:
        """Let its zygotes exit. Closing twice is safe."""
        self._closed = True
        if self._respawning:
            self._respawning.cancel()
        for version in (self.current, self.previous):
            if version is not None:
                version.close()


async def load_all(plugins: Iterable[Plugin], at_once: int) -> None:
    """Load plugins side by side, logging each that does not load."""
    limit = asyncio.Semaphore(at_once)

    async def load(plugin: Plugin) -> None:
        async with limit:
            try:
                await plugin.load()
            except PluginLoadError as error:
                extra = {"traceback": error.traceback} if error.traceback else {}
                get_logger().error("the plugin did not load", plugin=plugin.name, reason=str(error), **extra)
            except HostError as error:
                get_logger().error("the plugin did not load", plugin=plugin.name, reason=str(error))
            else:
                get_logger().info(
                    "plugin loaded",
                    plugin=plugin.name,
                    version=plugin.manifest.version,
                    sharing="strict" if plugin.current and plugin.current.strict else "fork",
                )
            for warning in plugin.current.warnings if plugin.current else plugin.manifest.warnings:
                get_logger().warning(warning, plugin=plugin.name)

    await asyncio.gather(*(load(plugin) for plugin in plugins))
