"""What counts as a plugin folder's content, and the digest of it."""

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Digests", "Signature", "content_files", "is_dropping", "signature"]

_SKIPPED: Final = frozenset({"__pycache__", "node_modules"})
# What editors, Python and file managers leave beside a file: never content.
_DROPPING = re.compile(
    r".*~|.*\.py[co]|.*\.sw[a-z]|\.#.*|#.*#|4913|.*\.tmp|\.goutputstream-.*|.*\.kate-swp|.*___jb_\w+___|\.~lock\..*"
    r"|\.DS_Store|Thumbs\.db|\.coverage.*"
)
# File systems stamp in ticks: a file changed this recently may change again under the same stamp.
_RACY: Final = 2.0
_READ: Final = 1 << 20

Signature = dict[str, tuple[int, int, int]]
"""Relative path to (modification time in ns, size, inode)."""


class _Known(NamedTuple):
    stamp: tuple[int, int, int]
    digest: bytes


def is_dropping(name: str) -> bool:
    """Whether a file or folder of this name never counts as content."""
    return name in _SKIPPED or _DROPPING.fullmatch(name) is not None


def content_files(folder: Path) -> Iterator[tuple[str, os.stat_result]]:
    """The relative path and status of every file that counts, in order; links are followed, each folder once."""
    root = os.path.realpath(folder)
    seen = set()
    for here, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_dropping(name) and not name.startswith("."))
        for name in sorted(files):
            if is_dropping(name):
                continue
            path = os.path.join(here, name)
            try:
                status = os.stat(path)
            except OSError:
                continue  # gone meanwhile, or a link to nothing
            if stat.S_ISREG(status.st_mode):
                yield os.path.relpath(path, root), status


def signature(folder: Path) -> Signature:
    """What can be seen of the content without reading it."""
    return {path: (status.st_mtime_ns, status.st_size, status.st_ino) for path, status in content_files(folder)}


class Digests:
    """Digests of folders; what has not changed since the last time is not read again. For one thread at a time."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, _Known]] = {}

    def of(self, folder: Path) -> str:
        """The digest of the folder's content: names and bytes, nothing else. Empty if there is no such folder."""
        root = os.path.realpath(folder)
        before = self._known.get(root, {})
        now: dict[str, _Known] = {}
        total = hashlib.sha256()
        racy = time.time_ns() - int(_RACY * 1e9)
        for path, status in content_files(folder):
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            known = before.get(path)
            if known is None or known.stamp != stamp or stamp[0] > racy:
                digest = _file_digest(os.path.join(root, path))
                if digest is None:
                    continue
                known = _Known(stamp, digest)
            now[path] = known
            name = path.encode("utf-8", "surrogateescape")
            total.update(len(name).to_bytes(4, "big") + name + known.digest)
        self._known[root] = now
        return total.hexdigest() if os.path.isdir(root) else ""

    def forget(self, folder: Path) -> None:
        """Keep nothing of a folder that is gone."""
        self._known.pop(os.path.realpath(folder), None)


def _file_digest(path: str) -> bytes | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # never waits, whatever it has become
    except OSError:
        return None
    digest = hashlib.sha256()
    with open(descriptor, "rb") as file:
        try:
            while data := file.read(_READ):
                digest.update(data)
        except OSError:
            return None
    return digest.digest()
