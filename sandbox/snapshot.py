"""The plugin's Python source as it was when this version was loaded.

A worker imports from here, whenever it does: a lazy import long after the file has changed still gets the version that
the rest of the worker runs. Bytecode files are neither read nor written: their check, by size and whole seconds, takes
one of two saves in the same second for the other. Files that are not Python source are read from the disk.
"""

import importlib.machinery
import importlib.util
import linecache
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from importlib.abc import MetaPathFinder, PathEntryFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Final

__all__ = ["Snapshot", "installed_sources"]

# Source beyond this is no plugin's own; it is imported from the disk.
_MAX_BYTES: Final = 64 << 20
_SKIPPED: Final = frozenset({"__pycache__", "node_modules"})
_ADDED: Final = "was added after this version of the plugin was loaded; it can be imported from the next reload on"
_IGNORED: Final = (
    "cannot be imported: code is not read from folders of a plugin that are named node_modules or begin with a dot; "
    "install packages where the host's Python finds them, or into a folder with another name"
)
_CHANGED: Final = "has changed since this version of the plugin was loaded; it can be imported from the next reload on"


class Snapshot:
    """The source files below ``root``, by path. ``instrument`` checks annotations at run time (typeguard)."""

    def __init__(self, root: str, *, instrument: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.sources: dict[str, bytes] = {}
        self.extensions: dict[str, tuple[int, int, int]] = {}
        self.folders = {self.root}
        self.complete = True
        self.instrument = instrument
        size = 0
        for path in _modules(self.root):
            try:
                if path.endswith(".py"):
                    with open(path, "rb") as file:
                        data = file.read(_MAX_BYTES - size + 1)
                    size += len(data)
                    if size > _MAX_BYTES:
                        self.complete = False
                        break
                    self.sources[path] = data
                else:
                    self.extensions[path] = _stamp(path)
            except OSError:
                continue  # gone meanwhile: the change brings the next reload
            folder = os.path.dirname(path)
            while folder not in self.folders:
                self.folders.add(folder)
                folder = os.path.dirname(folder)

    def contains(self, path: str) -> bool:
        """Whether ``path`` is in the plugin's folder."""
        return path == self.root or path.startswith(self.root + os.sep)

    def place(self, path: str) -> str | None:
        """``path`` as it is called here; ``None`` if it is not in the plugin's folder."""
        for known in (os.path.abspath(path), os.path.realpath(path)):  # a link in the folder may lead out of it
            if self.contains(known):
                return known
        return None

    def install(self) -> None:
        """Have all imports below ``root`` served from here."""

        def hook(path: str) -> PathEntryFinder:
            place = self.place(path)
            if place is None or os.path.isfile(place):  # an archive
                raise ImportError(f"{path} is not a folder of the plugin", path=path)
            return _Finder(self, place)

        sys.path_hooks.insert(0, hook)
        sys.meta_path.append(_Late(self))
        for path in list(sys.path_importer_cache):
            if self.place(path) is not None:
                del sys.path_importer_cache[path]

    def loader(self, name: str, path: str) -> SourceFileLoader:
        """The loader for one of the files."""
        if self.instrument:
            return _instrumented()(self, name, path)
        return _Loader(self, name, path)


def installed_sources() -> Iterable[bytes]:
    """The Python source of the plugin that this process has loaded."""
    return [
        source for finder in sys.meta_path if isinstance(finder, _Late) for source in finder._snapshot.sources.values()
    ]


def _stamp(path: str) -> tuple[int, int, int]:
    status = os.stat(path)
    return status.st_mtime_ns, status.st_size, status.st_ino


def _modules(root: str, above: frozenset[str] = frozenset()) -> Iterator[str]:
    above |= {os.path.realpath(root)}
    try:
        entries = sorted(os.scandir(root), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        if entry.is_dir():
            if (
                entry.name not in _SKIPPED
                and not entry.name.startswith(".")
                and os.path.realpath(entry.path) not in above  # a link back up
            ):
                yield from _modules(entry.path, above)
        elif entry.name.endswith((".py", *EXTENSION_SUFFIXES)) and entry.is_file():
            yield entry.path


class _Finder(PathEntryFinder):
    """Finds modules in one folder of the snapshot. Extension modules are on the disk, as they were or not at all."""

    def __init__(self, snapshot: Snapshot, folder: str) -> None:
        self._snapshot = snapshot
        self._folder = folder
        self._disk = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES), (SourceFileLoader, [".py"]))

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        snapshot, base = self._snapshot, os.path.join(self._folder, fullname.rpartition(".")[2])
        for path, locations in ((os.path.join(base, "__init__.py"), [base]), (base + ".py", None)):
            if path in snapshot.sources:
                return importlib.util.spec_from_file_location(
                    fullname, path, loader=snapshot.loader(fullname, path), submodule_search_locations=locations
                )
        found = self._disk.find_spec(fullname)
        if found is not None and found.origin is not None:
            if found.origin in snapshot.extensions:
                if _stamp(found.origin) == snapshot.extensions[found.origin]:
                    return found
                raise ImportError(f"{found.origin} {_CHANGED}", name=fullname, path=found.origin)
            if not snapshot.complete:
                return found
        if base in snapshot.folders:
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [base]
            return spec
        return None

    def invalidate_caches(self) -> None:
        self._disk.invalidate_caches()


class _Late(MetaPathFinder):
    """Asked last of all: says of a module that nobody has whether it came too late for this version."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        for folder in sys.path if path is None else path:
            place = self._snapshot.place(folder)
            if place is None:
                continue
            base = os.path.join(place, fullname.rpartition(".")[2])
            for file in (os.path.join(base, "__init__.py"), *(base + end for end in (".py", *EXTENSION_SUFFIXES))):
                if os.path.isfile(file):
                    inside = os.path.relpath(place, self._snapshot.root).split(os.sep)
                    ignored = any(name in _SKIPPED or (name.startswith(".") and name != ".") for name in inside)
                    raise ImportError(f"{file} {_IGNORED if ignored else _ADDED}", name=fullname, path=file)
        return None


class _Loader(SourceFileLoader):
    """Compiles from the snapshot. The path is the real one, so tracebacks name the author's file."""

    def __init__(self, snapshot: Snapshot, name: str, path: str) -> None:
        super().__init__(name, path)
        self._snapshot = snapshot

    def get_data(self, path: Any) -> bytes:
        source = self._snapshot.sources.get(path)
        return super().get_data(path) if source is None else source

    def get_code(self, fullname: str) -> CodeType | None:
        path = self.get_filename(fullname)
        data = self.get_data(path)
        code: CodeType = self.source_to_code(data, path)
        lines = importlib.util.decode_source(data).splitlines(keepends=True)
        linecache.cache[path] = (len(data), None, lines, path)  # tracebacks would show the lines that are there later
        return code


def _instrumented() -> type[_Loader]:
    from typeguard._importhook import TypeguardLoader  # it has no public name; `install_import_hook` reads the disk

    class Instrumented(_Loader):
        source_to_code = staticmethod(TypeguardLoader.source_to_code)

    return Instrumented
