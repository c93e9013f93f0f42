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
from .digest import Content
from .errors import HostError, PluginLoadError, RequestError
from .logs import get_logger
from .manifest import Manifest
from .pool import Pool
from .version import Version, differences
from .watcher import Hint, Watch

__all__ = ["Reloader", "rollback"]

_RESTART_FIRST: Final = 0.2
_RESTART_MOST: Final = 10.0
_MAX_LINE: Final = 16 << 20
# A folder that was written to while it was loaded is loaded again, unless the plugin itself seems to write there.
_UNSTABLE: Final = 2
# A plugin that writes into its folder when it is imported, and takes long to load, would otherwise never be loaded.
_MOST_GIVEN_UP: Final = 3


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
        unserved: dict[Path, list[str]],
        quiet: float,
        poll: bool,
    ) -> None:
        """``unserved`` is kept to be the folders that are not served, with every reason; what it has is reported."""
        self._directory = directory
        self._pool = pool
        self._plugins = plugins
        self._add = add
        self._watch = Watch(str(directory.absolute()), quiet, poll)
        self._tasks: dict[str, _PluginTask] = {}
        self._wake = asyncio.Event()
        self._touched: set[str] = set()
        self._unserved = unserved
        self._watching = asyncio.Event()
        self._running: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin to watch."""
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
            reason = "it died"
            try:
                await self._read_hints()
            except Exception as error:  # no process, no descriptor, or a bug of ours
                reason = str(error) or repr(error)
            self._watching.set()  # there may never be one
            if time.monotonic() - started > _RESTART_MOST:
                delay = _RESTART_FIRST
            get_logger().warning("there is no watcher; starting it anew", reason=reason)
            await asyncio.sleep(delay)
            delay = min(_RESTART_MOST, delay * 2)
            self._touch([""])  # what changed meanwhile was not seen

    async def _read_hints(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, ours:
            process = subprocess.Popen(  # noqa: ASYNC220  # an exec, without a shell or a wait
                [sys.executable, "-I", "-m", "hayhost.watcher", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
                cwd="/",
            )
            theirs.close()
            try:
                await self._follow_hints(ours)
            finally:
                process.kill()
                process.wait()

    async def _follow_hints(self, sock: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=sock.dup(), limit=_MAX_LINE)
        try:
            writer.write(msgspec.json.encode(self._watch) + b"\n")
            while line := await reader.readline():
                hint = msgspec.json.decode(line, type=Hint)
                if hint.problem:
                    get_logger().warning(hint.problem)
                if hint.ready:
                    self._watching.set()
                    self._touch([""])  # what changed before that was not seen
                if hint.touched:
                    self._touch(hint.touched)
        finally:
            writer.close()

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
        served = {plugin.name: plugin.manifest.folder for plugin in self._plugins.values()}
        loop = asyncio.get_running_loop()
        manifests, bad = await loop.run_in_executor(None, find_plugins, self._directory, served)
        self._report(bad)
        found = {manifest.name: manifest for manifest in manifests}
        problems = {entry.folder.resolve(): "\n".join(entry.problems) for entry in bad}
        for plugin in list(self._plugins.values()):
            if plugin.name not in found:
                if plugin.manifest.folder in problems:
                    self._set_aside(plugin, problems[plugin.manifest.folder])
                else:
                    self._remove(plugin)
        folders = {(self._directory / name).resolve() for name in touched}
        for name, manifest in found.items():
            known = self._plugins.get(name)
            if known is None:
                self._begin(self._add(manifest), manifest)
            elif "" in touched or manifest.folder in folders or manifest != known.tried:
                self._begin(known, manifest)

    def _report(self, bad: list[BadPlugin]) -> None:
        now = {entry.folder: entry.problems for entry in bad}
        for folder, problems in now.items():
            if self._unserved.get(folder) != problems:
                for problem in problems:
                    get_logger().error("a plugin is not served", folder=folder.name, reason=problem)
        self._unserved.clear()
        self._unserved.update(now)

    def _begin(self, plugin: Plugin, manifest: Manifest) -> None:
        task = self._tasks.get(plugin.name)
        if task is None or task.plugin is not plugin:
            task = self._tasks[plugin.name] = _PluginTask(plugin, self._pool)
        task.want(manifest)

    def _set_aside(self, plugin: Plugin, problem: str) -> None:
        """Its manifest is wrong: what serves goes on."""
        if (task := self._tasks.get(plugin.name)) is not None:
            task.drop()
        if plugin.tried is not None or plugin.error != problem:
            plugin.failed("manifest", HostError(problem), time.monotonic())
            plugin.tried = None
        plugin.settled.set()

    def _remove(self, plugin: Plugin) -> None:
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
        self._given_up = 0  # loads, one after the other, because of changes

    def want(self, manifest: Manifest) -> None:
        """The folder may have other content now."""
        self._wanted = manifest
        if self._load is not None and self._given_up < _MOST_GIVEN_UP:
            self._given_up += 1
            self._load.cancel()  # it loads what is no longer wanted
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._run())

    def drop(self) -> None:
        """What the folder has now is not to be loaded. An exchange that has begun comes to its end."""
        self._wanted = None
        if self._load is not None:
            self._load.cancel()

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
        content = await plugin.content(manifest)
        current = plugin.current
        if current is None:
            plugin.manifest = manifest
        if plugin.settled.is_set():
            if not content.digest or (manifest == plugin.tried and content.digest == plugin.seen):
                return  # it is being taken away, or was touched and not changed
            if current and current.alive and current.is_of(manifest, content.digest):
                plugin.error, plugin.traceback, plugin.tried, plugin.seen = "", "", manifest, content.digest
                get_logger().info("the plugin is again what is served", plugin=plugin.name)
                return
        version = await self._load_wanted(manifest, content, started)
        if version is None:
            return
        try:
            async with plugin.exchanging:
                if plugin.current and plugin.current.alive and plugin.current.is_of(manifest, version.digest):
                    return  # a lost zygote was started anew, from the same content
                await _exchange(self._pool, plugin, version, "reload" if plugin.current else "load", started)
        finally:
            if version not in (plugin.current, plugin.previous):
                version.close()
            plugin.settled.set()

    async def _load_wanted(self, manifest: Manifest, content: Content, started: float) -> Version | None:
        """A version of what is in the folder; ``None`` if it does not load or something else is wanted by now."""
        plugin = self.plugin
        self._load = load = asyncio.create_task(self._load_stable(manifest, content))
        try:
            version = await load
        except asyncio.CancelledError:
            if load.done() and not load.cancelled() and not load.exception():
                load.result().close()  # both came at once
            if (task := asyncio.current_task()) is not None and task.cancelling():
                raise
            plugin.tried = None
            return None
        except HostError as error:
            plugin.failed("reload" if plugin.current else "load", error, started)
            traceback = error.traceback if isinstance(error, PluginLoadError) else ""
            extra = {"traceback": traceback} if traceback else {}
            served = "the version before is served on" if plugin.current else "there is no version to serve"
            get_logger().error(f"not reloaded, {served}", plugin=plugin.name, reason=str(error), **extra)
            plugin.settled.set()
            self._given_up = 0
            return None
        finally:
            self._load = None
        if self._wanted is not None and self._given_up < _MOST_GIVEN_UP:  # a change came in the very last moment
            version.close()
            plugin.tried = None
            return None
        self._given_up = 0
        return version

    async def _load_stable(self, manifest: Manifest, content: Content) -> Version:
        """Load what is in the folder, and again if it was written to meanwhile: nobody may have saved what was read."""
        plugin = self.plugin
        for attempts in range(_UNSTABLE, -1, -1):
            version: Version | None = None
            error: HostError | None = None
            try:
                try:
                    version = await plugin.load_version(manifest, content.digest)
                except HostError as failure:
                    error = failure
                before, content = content, await plugin.content(manifest)
            except BaseException:
                if version is not None:
                    version.close()
                raise
            if before == content or not attempts:
                break
            if version is not None:
                version.close()
        plugin.seen = content.digest  # what the plugin itself has written is no change
        if version is None:
            assert error is not None
            raise error
        version.digest = content.digest
        return version


async def _exchange(pool: Pool, plugin: Plugin, version: Version, action: str, started: float) -> None:
    """Let ``version`` serve, and every live worker be replaced by one of it.

    One org's new worker is started before anything is changed: if it does not come up, the old version goes on serving.
    The caller holds ``plugin.exchanging``, and closes ``version`` if it does not serve.
    """
    tried = next((slot for slot in pool.slots.values() if slot.plugin is plugin and slot.worker is not None), None)
    if tried is not None and not await tried.try_version(version):
        error = PluginLoadError(f"its worker does not start: {tried.trial_error}")
        plugin.failed(action, error, started)
        get_logger().error("not reloaded, the version before is served on", plugin=plugin.name, reason=str(error))
        return
    if plugin.closed:
        return
    old = plugin.current  # not before: its zygote may have been started anew
    changes = differences(old, version) if old else []
    loaded = time.monotonic()
    plugin.serve(version, action, started, changes)
    workers = await pool.update(plugin) + (tried is not None)
    done = {"load": "plugin loaded", "reload": "reloaded", "rollback": "rolled back"}[action]
    get_logger().info(
        done,
        plugin=plugin.name,
        ms=round((time.monotonic() - started) * 1000),
        load_ms=round((loaded - started) * 1000),
        workers=workers,
        changes=", ".join(changes) or "no metadata",
        digest=version.digest[:12],
    )
    for warning in version.warnings:
        get_logger().warning(warning, plugin=plugin.name)


async def rollback(pool: Pool, plugin: Plugin) -> None:
    """Let the version before serve again. Raises ``RequestError`` (409) if there is none."""
    started = time.monotonic()
    async with plugin.exchanging:
        version = plugin.previous
        if version is None or not version.alive:
            raise RequestError(f"The plugin {plugin.name} has no version before this one to go back to", status=409)
        if version.strict:
            raise RequestError(f"The plugin {plugin.name} cannot go back: {version.strict_reason}", status=409)
        await _exchange(pool, plugin, version, "rollback", started)
        if plugin.current is not version:
            raise RequestError(f"The plugin {plugin.name} was not rolled back: {plugin.error}", status=409)
