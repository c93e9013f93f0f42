"""Stand-ins for what the host does around a worker, for the test kit: the manifest, routing, the process, its loop."""

import asyncio
import json
import os
import sys
import threading
import tomllib
from collections.abc import Coroutine, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Final, TypeVar
from urllib.parse import unquote

from hayhost.sdk import PluginError

from .confinement import MINIMAL_ENVIRONMENT
from .dispatch import Handler
from .spec import PluginSpec

__all__ = ["LoopThread", "World", "find_route", "read_manifest"]

T = TypeVar("T")

_CLOSE_SECONDS: Final = 5.0


def read_manifest(folder: Path, timeout: float) -> PluginSpec:
    """Take from the manifest what loading needs. ``hayhost check`` is what tells all that is wrong with one."""
    folder = folder.resolve()
    identity, manifest, where = {}, None, folder / "pyproject.toml"
    if where.is_file():
        project = tomllib.loads(where.read_text(encoding="utf-8"))
        identity, manifest = project.get("project", {}), project.get("tool", {}).get("hay-plugin")
    if manifest is None and (folder / "package.json").is_file():
        where = folder / "package.json"
        identity = json.loads(where.read_text(encoding="utf-8"))
        manifest = identity.get("hay-plugin")
    if manifest is None:
        raise PluginError(f'{folder} has no [tool.hay-plugin] in a pyproject.toml, nor "hay-plugin" in a package.json')
    entry, _, attribute = str(manifest.get("entry", "")).partition(":")
    if not entry:
        raise PluginError(f'{where}: `entry` is missing; it is the plugin\'s file, such as "./plugin.py"')
    return PluginSpec(
        folder=str(folder),
        entry=entry,
        attribute=attribute or None,
        name=str(identity.get("name", folder.name)).lower(),
        version=str(identity.get("version", "")),
        capabilities=tuple(manifest.get("capabilities", ())),
        env=tuple(manifest.get("env", ())),
        subprocess=tuple(manifest.get("permissions", {}).get("subprocess", ())),
        hook_timeout=timeout,
    )


def find_route(
    routes: Iterable[tuple[str, str, Handler]], method: str, path: str
) -> tuple[Handler, dict[str, str]] | set[str]:
    """The handler of ``method path`` and its parameters, or the methods that the path has: none, if it is unknown."""
    fitting = [(sent, route, handler) for sent, route, handler in routes if _params(route, path) is not None]
    wanted = "GET" if method == "HEAD" else method
    own = [(route, handler) for sent, route, handler in fitting if sent == wanted]
    if own:  # a literal segment wins over a parameter, at every depth
        route, handler = min(own, key=lambda pair: [segment.startswith("{") for segment in pair[0].split("/")])
        return handler, _params(route, path) or {}
    allowed = {sent for sent, _, _ in fitting}
    return allowed | {"HEAD"} if "GET" in allowed else allowed


def _params(route: str, path: str) -> dict[str, str] | None:
    """The parameters of ``path`` if it is one of ``route``'s paths."""
    patterns, segments = route.split("/"), path.split("/")
    if len(patterns) != len(segments):
        return None
    params = {}
    for pattern, segment in zip(patterns, segments, strict=True):
        if pattern.startswith("{") and segment:
            params[pattern[1:-1]] = unquote(segment, errors="replace")
        elif pattern != segment:
            return None
    return params


class LoopThread:
    """An event loop that runs in a thread, so that what the plugin leaves running goes on between two calls."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="plugin loop", daemon=True)
        self._thread.start()

    def run(self, what: str, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, or its error, raised in the thread of the caller."""

        async def guarded() -> tuple[T | None, BaseException | None]:
            try:
                return await work, None
            except BaseException as error:
                return None, error

        future = asyncio.run_coroutine_threadsafe(guarded(), self.loop)
        try:
            value, error = future.result(self._timeout)
        except TimeoutError:
            future.cancel()
            raise TimeoutError(f"{what} did not finish within {self._timeout:g} s") from None
        if error is not None:
            raise error
        return value  # type: ignore[return-value]  # without an error it is the T

    def close(self) -> None:
        """Cancel what still runs and end the thread. One that a plugin blocks is left behind."""

        async def cancel() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_CLOSE_SECONDS / 2)
            await self.loop.shutdown_asyncgens()

        try:
            asyncio.run_coroutine_threadsafe(cancel(), self.loop).result(_CLOSE_SECONDS)
        except TimeoutError:
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class World:
    """What a plugin sees of its process. Entering one leaves the world of another plugin, if one is entered."""

    _entered: ClassVar["World | None"] = None
    _lock: ClassVar = threading.RLock()

    def __init__(self, folder: str) -> None:
        self._root = os.path.join(folder, "")
        self._folder = folder
        self._path: list[str] | None = None
        self._hooks: list[Any] = []
        self._finders: list[Any] = []
        self._modules: dict[str, ModuleType] = {}

    def enter(self) -> None:
        """Make the process this plugin's, with the modules that it had when it was left."""
        with World._lock:
            if World._entered is self:
                return
            if World._entered is not None:
                World._entered.leave()
            self._outside = (list(sys.path), dict(sys.modules), dict(os.environ), os.getcwd())
            self._hooks_outside, self._finders_outside = list(sys.path_hooks), list(sys.meta_path)
            if self._path is not None:
                sys.path[:], sys.path_hooks[:], sys.meta_path[:] = self._path, self._hooks, self._finders
            self._forget_finders()
            sys.modules.update(self._modules)
            _set_environment(MINIMAL_ENVIRONMENT)
            os.chdir(self._folder)
            World._entered = self

    def leave(self) -> None:
        """Make the process what it was before, and keep the plugin's own modules; leaving twice does nothing."""
        with World._lock:
            if World._entered is not self:
                return
            World._entered = None
            path, modules, environment, cwd = self._outside
            for name, module in list(sys.modules.items()):
                before = modules.get(name)
                if module is before or not self._owns(module):
                    continue
                self._modules[name] = module
                if before is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = before
            self._path, sys.path[:] = list(sys.path), path
            self._hooks, sys.path_hooks[:] = list(sys.path_hooks), self._hooks_outside
            self._finders, sys.meta_path[:] = list(sys.meta_path), self._finders_outside
            self._forget_finders()
            _set_environment(environment)
            os.chdir(cwd)

    def _forget_finders(self) -> None:
        """The next import below the folder asks the hooks that hold now."""
        for path in list(sys.path_importer_cache):
            if _inside(path, self._root):
                del sys.path_importer_cache[path]

    def _owns(self, module: object) -> bool:
        names = getattr(module, "__dict__", {})  # not getattr: some modules import others when they are asked
        places = [names.get("__file__"), *list(names.get("__path__") or ())[:1]]
        return any(isinstance(place, str) and _inside(place, self._root) for place in places)


def _inside(place: str, root: str) -> bool:
    return os.path.join(os.path.realpath(place), "").startswith(root)


def _set_environment(variables: Mapping[str, str]) -> None:
    os.environ.clear()
    os.environ.update(variables)
