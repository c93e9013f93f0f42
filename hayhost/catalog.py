"""The plugins of a host: what their manifests and zygotes say, and their zygotes' lives."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Final

import msgspec

from .digest import Content, Digests
from .errors import HostError, ManifestError, PluginLoadError, SettingsError, UnavailableError
from .isolation import Isolation
from .logs import PluginLog, get_logger
from .manifest import Manifest, is_plugin_folder, read_manifest
from .metrics.counts import PluginCounts
from .processes import Nursery
from .version import Version, load_version, spec_of

__all__ = ["BadPlugin", "LoadRecord", "Plugin", "PluginState", "find_plugins", "load_all"]

# A plugin that loads for longer than this waits for something more likely than it works: others may begin.
_SLOW_LOAD: Final = 2.0
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


def find_plugins(directory: Path, served: Mapping[str, Path] | None = None) -> tuple[list[Manifest], list[BadPlugin]]:
    """Read the manifest of every plugin folder in ``directory``, in order of folder name.

    Of several with one name the one whose folder is ``served`` already counts, else the first. Raises ``SettingsError``
    if the directory cannot be read. One bad manifest never hides the others.
    """
    served = served or {}
    try:
        folders = sorted(path for path in directory.iterdir() if is_plugin_folder(path))
    except OSError as error:
        raise SettingsError(f"{directory}: cannot be read as a folder of plugins: {error.strerror}") from None
    found: dict[str, list[tuple[Path, Manifest]]] = {}
    bad = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
        except ManifestError as error:
            bad.append(BadPlugin(folder, error.problems))
            continue
        found.setdefault(manifest.name, []).append((folder, manifest))
    manifests = []
    for name, candidates in found.items():
        _, chosen = next((one for one in candidates if one[1].folder == served.get(name)), candidates[0])
        manifests.append(chosen)
        for folder, manifest in candidates:
            if manifest is not chosen:
                problem = f"{folder.name}: the name {name!r} is taken by the folder {chosen.folder.name!r}"
                bad.append(BadPlugin(folder, [f"{problem}, which is served; give one of them another name"]))
    return manifests, bad


class Plugin:
    """One plugin of the host: the version that serves, the one before it, and how its loads went."""

    def __init__(
        self,
        manifest: Manifest,
        nursery: Nursery,
        isolation: Isolation,
        *,
        hook_timeout: float,
        instrument: bool = False,
        tracing: bool = False,
    ) -> None:
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
        self.tried: Manifest | None = None
        """The manifest that was last tried, whether it loaded or not; ``None`` if the next look is to try again."""
        self.seen = ""
        """The digest of the content that was tried with it."""
        self.history: deque[LoadRecord] = deque(maxlen=_HISTORY)
        self.settled = asyncio.Event()
        """Set once the first load has succeeded or failed."""
        self.changed: Callable[[], None] = lambda: None
        """Called when another version serves."""
        self.reported: Callable[[], None] = lambda: None
        """Called when a load, whatever came of it, is in ``history``."""
        self.outdated: Callable[[], None] = lambda: None
        """Called when another version serves to whose loading nobody will exchange the workers."""
        self.exchanging = asyncio.Lock()
        """Held by whoever lets another version serve on purpose."""
        self.counts = PluginCounts()
        self.closed = False
        self.log = PluginLog(plugin=manifest.name)
        self.log.counts = self.counts.log
        self._nursery = nursery
        self._isolation = isolation
        self._hook_timeout = hook_timeout
        self._instrument = instrument
        self._tracing = tracing
        self._digests = Digests()
        self._respawning: asyncio.Task[Version] | None = None
        self._serves = asyncio.Event()

    @property
    def state(self) -> PluginState:
        """Whether it can be served."""
        if self.current is not None:
            return PluginState.READY
        return PluginState.ERROR if self.settled.is_set() else PluginState.LOADING

    def content(self, manifest: Manifest | None = None) -> "asyncio.Future[Content]":
        """What is in the folder (of ``manifest``) now, read on a thread."""
        folder = (manifest or self.manifest).folder
        return asyncio.get_running_loop().run_in_executor(None, self._digests.of, folder)

    async def load(self) -> None:
        """Load it for the first time. Raises ``PluginLoadError``, after which ``error`` says why."""
        started = time.monotonic()
        try:
            version = await self.load_version(self.manifest, (await self.content()).digest)
        except HostError as error:
            self.failed("load", error, started)
            raise
        else:
            self.serve(version, "load", started)
        finally:
            self.settled.set()

    async def load_version(self, manifest: Manifest, digest: str) -> Version:
        """A version of its own of the content that is in the folder now. Raises as ``hayhost.version.load_version``."""
        self.tried, self.seen = manifest, digest
        plan = self._isolation.plan(manifest)
        spec = spec_of(
            manifest, plan, hook_timeout=self._hook_timeout, instrument=self._instrument, tracing=self._tracing
        )
        return await load_version(self._nursery, manifest, digest, spec, self.log)

    def failed(self, action: str, error: HostError, started: float) -> None:
        """Keep why a load failed; what served goes on serving."""
        self.error = str(error)
        self.traceback = error.traceback if isinstance(error, PluginLoadError) else ""
        took = (time.monotonic() - started) * 1000
        self.counts.load(action, "error", took / 1000)
        version = (self.tried or self.manifest).version
        self.history.append(LoadRecord(time.time(), action, self.seen, version, took, self.error))
        self.reported()

    def serve(self, version: Version, action: str, started: float, changes: list[str] | None = None) -> None:
        """Let ``version`` serve from now on, and keep the one before it for a rollback."""
        old, self.current = self.current, version
        if version is self.previous:
            self.previous = None
        if old is not None and old is not version:
            self._keep(old)
        self.manifest = version.manifest
        self.counts.keep((route.method, route.path) for route in version.metadata.routes)
        self.error = self.traceback = ""
        self.log.bind(version=version.manifest.version)
        version.zygote.lost = lambda: self._lost(version)
        took = (time.monotonic() - started) * 1000
        self.counts.load(action, "ok", took / 1000)
        self.history.append(
            LoadRecord(time.time(), action, version.digest, version.manifest.version, took, changes=changes or [])
        )
        self._serves.set()
        self.changed()
        self.reported()

    def _keep(self, version: Version) -> None:
        """Keep ``version``, which served until now, unless there is nothing to go back to."""
        assert self.current is not None
        if not version.alive or version.digest == self.current.digest:
            version.close()
            return
        if self.previous is not None:
            self.previous.close()
        self.previous = version

    def _lost(self, version: Version) -> None:
        if self.closed:
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
            if before is not None and before.alive:
                return before  # a reload came first
            try:
                version = await self.load_version(self.manifest, (await self.content()).digest)
            except HostError as error:
                if self.current is not before:
                    continue
                self.failed("restart", error, started)
                get_logger().error("the plugin did not load again", plugin=self.name, reason=str(error))
                self._serves.clear()
                try:
                    async with asyncio.timeout(max(0.0, delay - (time.monotonic() - started))):
                        await self._serves.wait()
                except TimeoutError:
                    pass
                delay = min(_RETRY_MOST, delay * 2)
                continue
            if self.current is not before:
                version.close()
                continue
            self._serve_again(version, started)
            return version

    def _serve_again(self, version: Version, started: float) -> None:
        old = self.current
        self.serve(version, "restart", started)
        if old is not None and old.digest != version.digest:  # saved, and not reloaded yet
            self.outdated()

    async def ready_version(self) -> Version:
        """The version that serves, waited for while its zygote is started anew.

        Raises ``UnavailableError`` if the plugin did not load.
        """
        if self.closed:
            raise UnavailableError(f"The plugin {self.name} is not served any more")
        if self.current is None:
            raise UnavailableError(f"The plugin {self.name} is not loaded: {self.reason}", 5)
        return self.current if self.current.alive else await asyncio.shield(self._respawn())

    async def twin(self, version: Version) -> Version:
        """Another zygote of ``version``, for a worker that is not to be forked.

        Raises ``UnavailableError`` if the folder has other content by now, or ``HostError`` if it does not load.
        """
        if (await self.content(version.manifest)).digest != version.digest:
            raise UnavailableError(f"The files of the plugin {self.name} have changed since it was loaded", 5)
        return await load_version(
            self._nursery, version.manifest, version.digest, version.zygote.spec, self.log, worker=True
        )

    @property
    def reason(self) -> str:
        """One line on why it is not served."""
        return self.error.partition("\n")[0] or "it is still loading"

    async def renew(self) -> None:
        """Let a zygote of a new nursery serve in place of one that lost its own. Workers live on.

        If the folder's content does not load, the old one goes on: it is all there is of what it loaded.
        """
        old, started = self.current, time.monotonic()
        if self.previous is not None:
            self.previous.close()
            self.previous = None
        if old is None:
            return
        if not old.alive:  # it is being started anew already, from the new nursery
            await self._respawn()
            return
        try:
            version = await self.load_version(self.manifest, (await self.content()).digest)
        except HostError as error:
            self.failed("restart", error, started)
            get_logger().error("the plugin did not load again", plugin=self.name, reason=str(error))
            return
        if self.closed or self.current is not old:
            version.close()  # a reload came first
            return
        self._serve_again(version, started)
        old.close()
        self.previous = None

    def close(self) -> None:
        """Let its zygotes exit. Closing twice is safe."""
        self.closed = True
        if self._respawning:
            self._respawning.cancel()
        for version in (self.current, self.previous):
            if version is not None:
                version.close()


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
            sharing="strict" if plugin.current and plugin.current.strict else "fork",
            isolation=plugin.current.level.label if plugin.current else "",
            **({"reason": plugin.current.strict_reason} if plugin.current and plugin.current.strict else {}),
        )
    for warning in plugin.current.warnings if plugin.current else plugin.manifest.warnings:
        get_logger().warning(warning, plugin=plugin.name)
