"""The plugin's Python source as it was when this version was loaded.

A worker imports from here, whenever it does: a lazy import long after the file has changed still gets the version that
the rest of the worker runs. Bytecode files are neither read nor written: their check, by size and whole seconds, takes
one of two saves in the same second for the other. Files that are not Python source are read from the disk.
"""

import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Iterator
from importlib.abc import PathEntryFinder
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, FileFinder, ModuleSpec, SourceFileLoader
from types import CodeType, ModuleType
from typing import Any, Final

__all__ = ["Snapshot"]

# Source beyond this is no plugin's own; it is imported from the disk.
_MAX_BYTES: Final = 64 << 20
_SKIPPED: Final = frozenset({"__pycache__", "node_modules"})


class Snapshot:
    """The source files below ``root``, by real path. ``instrument`` checks annotations at run time (typeguard)."""

    def __init__(self, root: str, *, instrument: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.sources: dict[str, bytes] = {}
        self.folders = {self.root}
        self.complete = True
        self.instrument = instrument
        size = 0
        for path in _python_files(self.root):
            try:
                with open(path, "rb") as file:
                    data = file.read(_MAX_BYTES - size + 1)
            except OSError:
                continue  # gone meanwhile: the change brings the next reload
            size += len(data)
            if size > _MAX_BYTES:
                self.complete = False
                break
            self.sources[path] = data
            folder = os.path.dirname(path)
            while folder not in self.folders:
                self.folders.add(folder)
                folder = os.path.dirname(folder)

    def contains(self, path: str) -> bool:
        """Whether ``path`` is in the plugin's folder."""
        return path == self.root or path.startswith(self.root + os.sep)

    def install(self) -> None:
        """Have all imports below ``root`` served from here."""

        def hook(path: str) -> PathEntryFinder:
            real = os.path.realpath(path)
            if not self.contains(real):
                raise ImportError(f"{path} is not in the plugin's folder", path=path)
            return _Finder(self, real)

        sys.path_hooks.insert(0, hook)
        for path in list(sys.path_importer_cache):
            if self.contains(os.path.realpath(path)):
                del sys.path_importer_cache[path]

    def loader(self, name: str, path: str) -> SourceFileLoader:
        """The loader for one of the files."""
        if self.instrument:
            return _instrumented()(self, name, path)
        return _Loader(self, name, path)


def _python_files(root: str) -> Iterator[str]:
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:  # a link back up
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if name not in _SKIPPED and not name.startswith("."))
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.endswith(".py") and os.path.isfile(path):
                yield path


class _Finder(PathEntryFinder):
    """Finds modules in one folder of the snapshot; extension modules, which cannot change under us, on the disk."""

    def __init__(self, snapshot: Snapshot, folder: str) -> None:
        self._snapshot = snapshot
        self._folder = folder
        self._extensions = FileFinder(folder, (ExtensionFileLoader, EXTENSION_SUFFIXES))

    def find_spec(self, fullname: str, target: ModuleType | None = None) -> ModuleSpec | None:
        snapshot, base = self._snapshot, os.path.join(self._folder, fullname.rpartition(".")[2])
        package = os.path.join(base, "__init__.py")
        for path, locations in ((package, [base]), (base + ".py", None)):
            if path in snapshot.sources:
                return importlib.util.spec_from_file_location(
                    fullname, path, loader=snapshot.loader(fullname, path), submodule_search_locations=locations
                )
            if os.path.isfile(path):
                if not snapshot.complete:
                    return importlib.util.spec_from_file_location(fullname, path, submodule_search_locations=locations)
                late = (
                    "was added after this version of the plugin was loaded; it can be imported from the next reload on"
                )
                raise ImportError(f"{path} {late}", name=fullname, path=path)
        extension = self._extensions.find_spec(fullname)
        if extension is not None and extension.loader is not None:
            return extension
        if base in snapshot.folders:
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [base]
            return spec
        return None

    def invalidate_caches(self) -> None:
        self._extensions.invalidate_caches()


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
        code: CodeType = self.source_to_code(self.get_data(path), path)
        return code


def _instrumented() -> type[_Loader]:
    from typeguard._importhook import TypeguardLoader  # it has no public name; `install_import_hook` reads the disk

    class Instrumented(_Loader):
        source_to_code = staticmethod(TypeguardLoader.source_to_code)

    return Instrumented
