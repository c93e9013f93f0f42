"""Hot reload: from a hint that a folder was touched to new code that answers, or to the old that still does."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from .catalog import BadPlugin, Plugin, find_plugins
from .errors import HostError, PluginLoadError, RequestError
from .logs import get_logger
from .manifest import Manifest
from .pool import Pool, Slot
from .version import Version, differences
from .watcher import Hint, Watch

__all__ = ["Reloader", "rollback"]

# Orgs whose workers are exchanged side by side: enough to be quick, few enough to leave the machine to requests.
_AT_ONCE: Final = 4
_RESTART_FIRST: Final = 0.2
_RESTART_MOST: Final = 10.0
_MAX_LINE: Final = 16 << 20


class Reloader:
    """Watches a folder of plugins and keeps ``plugins`` what it says.

    One task at a time looks at the folder, one per plugin loads and swaps. A plugin's task works on the content that
    was seen last: a save while it loads makes it begin again, a save while it swaps makes it go round once more.
    """

    def __init__(
        self,
        directory: Path,
        pool: Pool,
        plugins: dict[str, Plugin],
        add: Callable[[Manifest], Plugin],
        *,
        quiet: float,
        poll: bool,
    ) -> None:
        self._directory = directory
        self._pool = pool
        self._plugins = plugins
        self._add = add
        self._watch = Watch(str(directory.absolute()), quiet, poll)
        self._tasks: dict[str, _PluginTask] = {}
        self._wake = asyncio.Event()
        self._touched: set[str] = set()
        self._bad: dict[Path, list[str]] = {}
        self._watching = asyncio.Event()
        self._running: list[asyncio.Task[None]] = []

    def start(self, bad: list[BadPlugin]) -> None:
        """Begin to watch. ``bad`` is what has been reported as wrong already."""
        self._bad = {entry.folder: entry.problems for entry in bad}
        self._running = [
            asyncio.create_task(self._keep_watching()),
            asyncio.create_task(self._follow()),
        ]

    async def watching(self) -> None:
        """Wait until every later change is seen."""
        await self._watching.wait()

    async def stop(self) -> None:
        """Watch no more. Stopping twice is safe."""
        tasks, self._running = [*self._running, *(task.task for task in self._tasks.values() if task.task)], []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- hints

    async def _keep_watching(self) -> None:
        delay = _RESTART_FIRST
        while True:
            started = time.monotonic()
            try:
                await self._read_hints()
            except OSError as error:
                get_logger().error("the watcher cannot be started", reason=error.strerror or str(error))
            if time.monotonic() - started > _RESTART_MOST:
                delay = _RESTART_FIRST
            get_logger().warning("the watcher died; starting it anew")
            await asyncio.sleep(delay)
            delay = min(_RESTART_MOST, delay * 2)
            self._touch([""])  # what changed meanwhile was not seen

    async def _read_hints(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(  # noqa: ASYNC220  # an exec, without a shell or a wait
                [sys.executable, "-I", "-m", "hayhost.watcher", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
        try:
            reader, writer = await asyncio.open_connection(sock=ours, limit=_MAX_LINE)
            writer.write(msgspec.json.encode(self._watch) + b"\n")
            while line := await reader.readline():
                hint = msgspec.json.decode(line, type=Hint)
                if hint.problem:
                    get_logger().warning(hint.problem)
                if hint.ready:
                    self._watching.set()
                if hint.touched:
                    self._touch(hint.touched)
            writer.close()
        finally:
            ours.close()
            process.kill()
            process.wait()

    def _touch(self, names: list[str]) -> None:
        self._touched.update(names)
        self._wake.set()

    # ---- what the folder says

    async def _follow(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            touched, self._touched = self._touched, set()
            try:
                await self._look(touched)
            except HostError as error:
                get_logger().warning("the plugins are served as they were", reason=str(error))
            except Exception as error:  # a bug of ours must not end reloading for good
                get_logger().exception("looking for changed plugins failed", reason=repr(error))

    async def _look(self, touched: set[str]) -> None:
        if not self._directory.is_dir():
            get_logger().warning("the plugins folder is gone; its plugins are served on", folder=str(self._directory))
            return
        manifests, bad = await asyncio.get_running_loop().run_in_executor(None, find_plugins, self._directory)
        self._report(bad)
        found = {manifest.name: manifest for manifest in manifests}
        bad_folders = {entry.folder.resolve() for entry in bad}
        for plugin in list(self._plugins.values()):
            if plugin.name not in found:
                if plugin.manifest.folder in bad_folders:
                    problems = next(entry.problems for entry in bad if entry.folder.resolve() == plugin.manifest.folder)
                    plugin.failed("manifest", HostError("\n".join(problems)), time.monotonic())
                    plugin.seen = ""
                else:
                    await self._remove(plugin)
        for name, manifest in found.items():
            known = self._plugins.get(name)
            if known is None:
                self._begin(self._add(manifest), manifest)
            elif (
                not touched
                or "" in touched
                or self._is_touched(manifest, touched)
                or (manifest.folder != known.manifest.folder)
            ):
                self._begin(known, manifest)

    def _is_touched(self, manifest: Manifest, touched: set[str]) -> bool:
        return any((self._directory / name).resolve() == manifest.folder for name in touched)

    def _report(self, bad: list[BadPlugin]) -> None:
        now = {entry.folder: entry.problems for entry in bad}
        for folder, problems in now.items():
            if self._bad.get(folder) != problems:
                for problem in problems:
                    get_logger().error("a plugin is not served", folder=folder.name, reason=problem)
        self._bad = now

    def _begin(self, plugin: Plugin, manifest: Manifest) -> None:
        task = self._tasks.get(plugin.name)
        if task is None or task.plugin is not plugin:
            task = self._tasks[plugin.name] = _PluginTask(plugin, self._pool)
        task.want(manifest)

    async def _remove(self, plugin: Plugin) -> None:
        del self._plugins[plugin.name]
        if (task := self._tasks.pop(plugin.name, None)) is not None:
            task.cancel()
        plugin.close()
        plugin.settled.set()
        self._pool.remove(plugin)
        get_logger().info("plugin removed", plugin=plugin.name)


class _PluginTask:
    """Brings one plugin to the content of its folder."""

    def __init__(self, plugin: Plugin, pool: Pool) -> None:
        self.plugin = plugin
        self.task: asyncio.Task[None] | None = None
        self._pool = pool
        self._wanted: Manifest | None = None
        self._load: asyncio.Task[Version] | None = None

    def want(self, manifest: Manifest) -> None:
        """The folder may have other content now."""
        self._wanted = manifest
        if self._load is not None:
            self._load.cancel()  # it loads what is no longer wanted
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._run())

    def cancel(self) -> None:
        """The plugin is gone."""
        self._wanted = None
        if self.task is not None:
            self.task.cancel()

    async def _run(self) -> None:
        while self._wanted is not None:
            manifest, self._wanted = self._wanted, None
            try:
                await self._reload(manifest)
            except Exception as error:  # a bug of ours must not end reloading for good
                get_logger().exception("a reload failed", plugin=self.plugin.name, reason=repr(error))

    async def _reload(self, manifest: Manifest) -> None:
        plugin, started = self.plugin, time.monotonic()
        moved = manifest.folder != plugin.manifest.folder
        before, plugin.manifest = plugin.manifest, manifest
        digest = await plugin.digest()
        if digest == plugin.seen and plugin.settled.is_set() and not moved:
            return  # touched, but not changed
        if plugin.current is not None and digest == plugin.current.digest and plugin.current.alive and not moved:
            plugin.error, plugin.traceback, plugin.seen = "", "", digest  # changed back to what serves
            get_logger().info("the plugin is again what is served", plugin=plugin.name)
            return
        self._load = asyncio.create_task(plugin.load_version(manifest, digest))
        try:
            version = await self._load
        except asyncio.CancelledError:
            if self._wanted is None:
                raise
            plugin.seen = ""
            return  # another change came: begin again with that
        except HostError as error:
            plugin.failed("reload", error, started)
            traceback = error.traceback if isinstance(error, PluginLoadError) else ""
            extra = {"traceback": traceback} if traceback else {}
            served = "the version before is served on" if plugin.current else "there is no version to serve"
            get_logger().error(f"not reloaded, {served}", plugin=plugin.name, reason=str(error), **extra)
            plugin.manifest = before if plugin.current else manifest
            return
        finally:
            self._load = None
            plugin.settled.set()
        await exchange(self._pool, plugin, version, "reload", started)


async def exchange(pool: Pool, plugin: Plugin, version: Version, action: str, started: float) -> None:
    """Let ``version`` serve, and every live worker be replaced by one of it.

    The first org's new worker is started before anything is changed: if it does not come up, the old version goes on
    serving and ``version`` is closed.
    """
    old = plugin.current
    slots = [slot for slot in pool.slots.values() if slot.plugin is plugin and slot.worker is not None]
    if slots and not await slots[0].try_version(version):
        error = PluginLoadError(f"its worker does not start: {slots[0].trial_error}")
        plugin.failed(action, error, started)
        if version is not plugin.previous:
            version.close()
        get_logger().error("not reloaded, the version before is served on", plugin=plugin.name, reason=str(error))
        return
    changes = differences(old, version) if old else []
    loaded = time.monotonic()
    plugin.serve(version, action, started, changes)
    await _replace_all(slots, version)
    if old is not None and old is not version:
        plugin.keep(old)
    done = {"reload": "reloaded" if old else "plugin loaded", "rollback": "rolled back"}[action]
    get_logger().info(
        done,
        plugin=plugin.name,
        ms=round((time.monotonic() - started) * 1000),
        load_ms=round((loaded - started) * 1000),
        workers=len(slots),
        changes=", ".join(changes) or "no metadata",
        digest=version.digest[:12],
    )
    for warning in version.warnings:
        get_logger().warning(warning, plugin=plugin.name)


async def _replace_all(slots: list[Slot], version: Version) -> None:
    limit = asyncio.Semaphore(_AT_ONCE)

    async def replace(slot: Slot) -> None:
        async with limit:
            if slot.worker is not None and slot.worker.version is not version:
                await slot.replace("another version serves", version, carry=True)

    await asyncio.gather(*(replace(slot) for slot in slots))


async def rollback(pool: Pool, plugin: Plugin) -> None:
    """Let the version before serve again. Raises ``RequestError`` (409) if there is none."""
    version = plugin.previous
    if version is None or not version.alive:
        raise RequestError(f"The plugin {plugin.name} has no version before this one to go back to", status=409)
    if version.strict:
        raise RequestError(f"The plugin {plugin.name} cannot go back: {version.strict_reason}", status=409)
    started = time.monotonic()
    await exchange(pool, plugin, version, "rollback", started)
    if plugin.current is not version:
        raise RequestError(f"The plugin {plugin.name} was not rolled back: {plugin.error}", status=409)
