"""What counts as a plugin folder's content, and the digest of it."""

import hashlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["Content", "Digests", "Signature", "content_files", "is_dropping", "signature"]

_SKIPPED: Final = frozenset({"__pycache__", "node_modules"})
# What editors, Python and file managers leave beside a file: never content.
_DROPPING = re.compile(
    r".*~|.*\.py[co]|.*\.sw[a-z]|\.#.*|#.*#|4913|.*\.tmp|\.goutputstream-.*|.*\.kate-swp|.*___jb_\w+___|\.~lock\..*"
    r"|\.DS_Store|Thumbs\.db|\.coverage.*"
)
# File systems stamp in ticks: a file changed this recently may change again under the same stamp.
_RACY: Final = 2.0
_READ: Final = 1 << 20

_Stamp = tuple[int, int, int, int]
Signature = dict[str, _Stamp]
"""Relative path to (modification time and change time in ns, size, inode)."""


class Content(NamedTuple):
    """What a folder had in it: equal if nothing was written in between, not even the same again."""

    digest: str
    """Of names and bytes, nothing else. Empty if there is no such folder."""
    files: Signature


class _Known(NamedTuple):
    stamp: _Stamp
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
    return {path: _stamp(status) for path, status in content_files(folder)}


def _stamp(status: os.stat_result) -> _Stamp:
    # Copying tools set the modification time; the change time is the kernel's own.
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino


class Digests:
    """Reads folders; what has not changed since the last time is not read again."""

    def __init__(self) -> None:
        self._known: dict[str, dict[str, _Known]] = {}

    def of(self, folder: Path) -> Content:
        """What is in ``folder`` now. From any thread; two at once may both read."""
        root = os.path.realpath(folder)
        before = self._known.get(root, {})
        now: dict[str, _Known] = {}
        total = hashlib.sha256()
        racy = time.time_ns() - int(_RACY * 1e9)
        for path, status in content_files(folder):
            stamp = _stamp(status)
            known = before.get(path)
            if known is None or known.stamp != stamp or max(stamp[:2]) > racy:
                digest = _file_digest(os.path.join(root, path))
                if digest is None:
                    continue
                known = _Known(stamp, digest)
            now[path] = known
            name = path.encode("utf-8", "surrogateescape")
            total.update(len(name).to_bytes(4, "big") + name + known.digest)
        if not os.path.isdir(root):
            self._known.pop(root, None)
            return Content("", {})
        self._known = {root: now}  # of a folder that has moved away nothing is kept
        return Content(total.hexdigest(), {path: known.stamp for path, known in now.items()})


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
