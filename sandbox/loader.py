"""Importing a plugin and running its ``on_initialize``: what a plugin zygote is for."""

import asyncio
import importlib
import importlib.util
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType, ModuleType
from typing import Any

import hayhost.sdk
from hayhost.sdk import HayGlobalContext, HayPlugin, Logger
from hayhost.sdk._registry import Registry
from hayhost.sdk.definition import Hook
from hayhost.sdk.errors import DefinitionError

from .snapshot import Snapshot
from .spec import PluginSpec

__all__ = ["LoadedPlugin", "author_traceback", "describe", "import_entry", "load", "time_limit"]

_MAX_TRACEBACK = 32 << 10
_OURS = tuple(os.path.join(os.path.dirname(file), "") for file in (__file__, hayhost.sdk.__file__, importlib.__file__))


@dataclass(frozen=True, slots=True)
class LoadedPlugin:
    """A plugin after ``on_initialize``: its registry, and its hooks by name."""

    spec: PluginSpec
    title: str
    hooks: dict[str, Hook]
    registry: Registry


def author_traceback(error: BaseException, folder: str) -> str:
    """The traceback of ``error`` with the frames of files in ``folder`` only; if it has none, of all but ours."""
    root = os.path.join(os.path.realpath(folder), "")
    report = traceback.TracebackException.from_exception(error)
    seen: set[int] = set()
    pending: list[traceback.TracebackException | None] = [report]
    while pending:
        part = pending.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        files = [frame for frame in part.stack if os.path.isabs(frame.filename)]  # and not <frozen importlib>
        own = [frame for frame in files if os.path.realpath(frame.filename).startswith(root)]
        foreign = [frame for frame in files if not frame.filename.startswith(_OURS)]
        if isinstance(error, SyntaxError) and part is report and str(error.filename).startswith(root):
            foreign = []  # the report has the author's line; who compiled it is of no interest
        part.stack = traceback.StackSummary.from_list(own or foreign)
        pending += [part.__cause__, part.__context__]
    text = "".join(report.format()).rstrip()
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= _MAX_TRACEBACK else text[: _MAX_TRACEBACK // 2] + "\n…\n" + text[-_MAX_TRACEBACK // 2 :]


def describe(error: BaseException) -> str:
    """``Type: text`` of ``error``, whatever its author made of it."""
    name = type(error).__name__
    try:
        text = f"{name}: {error}" if str(error) else name
    except Exception as second:
        text = f"{name}: its text cannot be had: {type(second).__name__}"
    return text.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not UTF-8


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise ``TimeoutError`` in the main thread, at the line it is at, if the block takes longer than ``seconds``."""

    def expired(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"{what} did not finish within {seconds:g} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def import_entry(spec: PluginSpec) -> ModuleType:
    """Import the plugin's entry module, with the plugin's folder first on ``sys.path``.

    A file inside a package (a folder with ``__init__.py``) is imported as part of it, so relative imports work; any
    other file as a top-level module, with its own folder on the path too. Raises whatever the import raises, and
    ``DefinitionError`` if the module turns out to come from outside the plugin's folder.
    """
    root = os.path.realpath(spec.folder)
    if spec.entry.endswith(".py"):
        file = os.path.realpath(os.path.join(root, spec.entry))
        base, parts = os.path.dirname(file), [os.path.basename(file)[:-3]]
        while base != root and os.path.exists(os.path.join(base, "__init__.py")):
            parts.insert(0, os.path.basename(base))
            base = os.path.dirname(base)
        name, file_given = ".".join(parts), True
    else:
        file, base, name, file_given = "", root, spec.entry, False
    sys.path[:0] = dict.fromkeys((root, base))
    snapshot = Snapshot(root, instrument=spec.instrument)
    snapshot.install()
    importlib.invalidate_caches()
    if file_given and (name.partition(".")[0] in sys.modules or not _finds(name, file)):
        # A plugin may call its file json.py or worker.py: ours is imported already, so give it a name of its own.
        name = "hay_plugin_" + name.replace(".", "_").replace("-", "_")
        found = importlib.util.spec_from_file_location(name, file, loader=snapshot.loader(name, file))
        if found is None or found.loader is None:
            raise DefinitionError(f"entry {spec.entry!r} is not a Python file")
        module = importlib.util.module_from_spec(found)
        sys.modules[name] = module
        found.loader.exec_module(module)
    else:
        module = importlib.import_module(name)
    origin = os.path.realpath(module.__file__ or "")
    if not origin.startswith(os.path.join(root, "")):
        raise DefinitionError(f"entry {spec.entry!r} was imported from outside the plugin's folder")
    return module


def _finds(name: str, file: str) -> bool:
    if "." in name:  # finding a submodule imports its parents: only for real packages of the plugin
        return True
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    return found is not None and found.origin is not None and os.path.realpath(found.origin) == file


def find_plugin(module: ModuleType, attribute: str | None) -> HayPlugin:
    """The one ``define_hay_plugin(...)`` result that ``module`` exports, or the one called ``attribute``.

    Raises ``DefinitionError`` if there is none, or several and no attribute picks one.
    """
    where = f"entry module {module.__name__!r}"
    if attribute is not None:
        value = getattr(module, attribute, None)
        if isinstance(value, HayPlugin):
            return value
        raise DefinitionError(
            f"{where} has no attribute {attribute!r} that is the result of define_hay_plugin(...)"
            + ("" if value is None else f"; it is {type(value).__name__}")
        )
    exported = {id(value): name for name, value in vars(module).items() if isinstance(value, HayPlugin)}
    match list(exported.values()):
        case []:
            raise DefinitionError(f"{where} exports no result of define_hay_plugin(...); exactly one is needed")
        case [name]:
            plugin: HayPlugin = getattr(module, name)
            return plugin
        case names:
            raise DefinitionError(
                f"{where} exports {len(names)} results of define_hay_plugin(...) ({', '.join(names)}); "
                'keep one, or pick one in the manifest with `entry = "./file.py:attribute"`'
            )


def load(spec: PluginSpec, logger: Logger, stamp: Callable[[str], None]) -> LoadedPlugin:
    """Import the plugin, build its definition and run ``on_initialize``. Raises what the plugin raises."""
    with time_limit(spec.hook_timeout, "importing the plugin"):
        module = import_entry(spec)
    stamp("import")
    registry = Registry(spec.capabilities, spec.env)
    ctx = HayGlobalContext(registry, logger)
    with time_limit(spec.hook_timeout, "creating the plugin"):
        title, hooks = find_plugin(module, spec.attribute).create(ctx)
    if initialize := hooks.get("on_initialize"):
        with time_limit(spec.hook_timeout, "on_initialize"):
            _finish(initialize(ctx))
    registry.freeze()
    stamp("on_initialize")
    return LoadedPlugin(spec, title, hooks, registry)


def _finish(result: Any) -> None:
    """Run what an async hook returned to its end. The loop is gone afterwards: a process that forks has none."""
    if inspect.isawaitable(result):

        async def wait() -> None:
            await result

        asyncio.run(wait())
