"""The watcher: a small process that says which plugin folders were touched.

It is a process of its own so that a flood of file events costs the front's loop nothing, and so that its threads are
never near a fork. It only gives hints, one JSON line each: the front compares contents before it does anything.

watchdog reports events; a rescan finds what events missed, and is all there is with ``--poll``.
"""

import errno
import logging
import os
import select
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec
from watchdog.events import (
    EVENT_TYPE_DELETED,
    DirCreatedEvent,
    DirDeletedEvent,
    DirMovedEvent,
    FileClosedEvent,
    FileCreatedEvent,
    FileDeletedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileSystemEvent,
    FileSystemEventHandler,
)
from watchdog.observers import Observer

from .digest import Signature, is_dropping, signature

__all__ = ["Hint", "Watch", "main"]

# Everything that can change content; reading does not.
_EVENTS: Final[list[type[FileSystemEvent]]] = [
    FileCreatedEvent,
    FileModifiedEvent,
    FileMovedEvent,
    FileDeletedEvent,
    FileClosedEvent,
    DirCreatedEvent,
    DirMovedEvent,
    DirDeletedEvent,
]
# However long files go on changing, a hint is given after this many seconds.
_LONGEST: Final = 30.0
_QUIET_SHARE: Final = 0.1
_QUIET_MOST: Final = 1.0
_RESCAN: Final = 10.0
_POLL: Final = 0.5
_MISSING: Final = 0.2
# A directory that is moved away, or a link that is set anew, makes no event of its own.
_HEARTBEAT: Final = 1.0


class Watch(msgspec.Struct, frozen=True):
    """What to watch: a folder of plugins. ``quiet`` is in seconds."""

    directory: str
    quiet: float
    poll: bool


class Hint(msgspec.Struct, frozen=True):
    """Folders whose content may have changed (by name), or, in ``problem``, why changes may be seen late or not."""

    touched: list[str] = []
    problem: str = ""
    ready: bool = False


class _Handler(FileSystemEventHandler):
    """Notes which top-level folder each event is in. Runs on watchdog's thread; keeps it as short as can be."""

    def __init__(self, watcher: "_Watcher", root: str, name: str | None) -> None:
        self._watcher = watcher
        self._skip = len(root) + 1
        self._name = name

    def dispatch(self, event: FileSystemEvent) -> None:
        for path in (event.src_path, event.dest_path):
            if path:
                text = os.fsdecode(path)[self._skip :]
                if not text and event.event_type == EVENT_TYPE_DELETED:
                    self._watcher.look_anew()  # what is watched is gone, and may come back under the same name
                parts = text.split(os.sep) if text else []
                folders = parts if event.is_directory else parts[:-1]
                if any(is_dropping(part) for part in parts) or any(part[:1] == "." for part in folders):
                    continue
                self._watcher.touch(self._name or (parts[0] if parts else ""))


class _Complaints(logging.Handler):
    """watchdog logs when it may have lost events."""

    def __init__(self, watcher: "_Watcher") -> None:
        super().__init__(logging.WARNING)
        self._watcher = watcher

    def emit(self, record: logging.LogRecord) -> None:
        self._watcher.missed = True


class _Watcher:
    def __init__(self, watch: Watch, control: socket.socket) -> None:
        self._watch = watch
        self._directory = Path(watch.directory)
        self._control = control
        self._lock = threading.Lock()
        self._touched: set[str] = set()
        self._first = self._last = 0.0
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._observer: Any = None
        self._root: tuple[int, int] | None = None
        self._signatures: dict[str, Signature] = {}
        self._linked: dict[str, tuple[str, int, int]] = {}
        self._anew = False
        self.missed = False
        """Whether events may have been lost."""
        self._told = ""

    def touch(self, name: str) -> None:
        """Something below ``name`` has changed; without a name anything may have."""
        now = time.monotonic()
        if not name.isprintable():
            name = ""  # it may be no UTF-8
        with self._lock:
            fresh = not self._touched
            self._touched.add(name)
            self._last = now
            if fresh:
                self._first = now
        if fresh:
            os.write(self._writer, b"!")

    def look_anew(self) -> None:
        """Something that was watched is gone: have events for what is there now."""
        self._anew = True
        self.touch("")

    def run(self) -> None:
        """Watch until the front is gone."""
        log = logging.getLogger("watchdog")
        log.addHandler(_Complaints(self))
        log.propagate = False
        self._observe()
        self._rescan(report=False)
        with self._lock:
            self._touched.clear()
        self._tell(Hint(ready=True))  # the front compares everything now
        next_scan = time.monotonic() + self._pause()
        while True:
            now = time.monotonic()
            due = min(next_scan, now + _HEARTBEAT)
            with self._lock:
                if self._touched:
                    due = min(due, self._last + self._watch.quiet, self._first + _LONGEST)
            control = self._control.fileno()
            readable, _, _ = select.select([control, self._reader], [], [], max(0.0, due - now))
            if control in readable and self._front_is_gone():
                return
            if self._reader in readable:
                os.read(self._reader, 4096)
            self._observe()
            next_scan = min(next_scan, time.monotonic() + self._pause())
            if self.missed or time.monotonic() >= next_scan:
                self.missed = False
                self._rescan(report=True)
                next_scan = time.monotonic() + self._pause()
            now = time.monotonic()
            with self._lock:
                quiet = self._touched and (now >= self._last + self._watch.quiet or now >= self._first + _LONGEST)
                names, self._touched = (self._touched, set()) if quiet else (set(), self._touched)
            if names:
                self._tell(Hint(touched=sorted(names)))

    def _front_is_gone(self) -> bool:
        try:
            return not self._control.recv(64)
        except OSError:
            return True

    def _pause(self) -> float:
        if not self._directory.is_dir():
            return _MISSING
        return _POLL if self._watch.poll or self._observer is None else _RESCAN

    def _folders(self) -> dict[str, Path]:
        try:
            return {path.name: path for path in self._directory.iterdir() if path.is_dir() and path.name[:1] != "."}
        except OSError:
            return {}

    def _rescan(self, *, report: bool) -> None:
        if not self._directory.is_dir() and self._signatures:
            return  # moved away: what it had counts until it is back
        seen = {name: signature(path) for name, path in self._folders().items()}
        if report:
            for name in seen.keys() | self._signatures.keys():
                if seen.get(name) != self._signatures.get(name):
                    self.touch(name)
        self._signatures = seen
        if self._observer is not None:
            try:  # watchdog says nothing if a folder of many cannot be watched: see if one more could
                self._observer.unschedule(
                    self._observer.schedule(FileSystemEventHandler(), os.sep, event_filter=_EVENTS)
                )
            except OSError as error:
                self._give_up(error)

    def _observe(self) -> None:
        """Have events for the directory as it is now, and for folders that it links to."""
        try:
            status = os.stat(self._directory)
            root: tuple[int, int] | None = (status.st_dev, status.st_ino)
        except OSError:
            root = None
        linked = {}
        for name, path in self._folders().items() if root else ():
            if path.is_symlink():
                try:
                    status = os.stat(path)
                except OSError:
                    continue
                linked[name] = (os.path.realpath(path), status.st_dev, status.st_ino)
        anew, self._anew = self._anew, False
        if root == self._root and linked == self._linked and not anew:
            return
        if root != self._root:
            self.touch("")  # the directory itself was exchanged
        for name in linked.keys() | self._linked.keys():
            if linked.get(name) != self._linked.get(name):
                self.touch(name)
        self._root, self._linked = root, linked
        if self._watch.poll:
            return
        old, self._observer = self._observer, None
        if root is not None:
            self._start_observer()
        if old is not None:
            old.stop()  # only now: no event is missed in between

    def _start_observer(self) -> None:
        observer: Any = None
        try:
            observer = Observer()
            real = os.path.realpath(self._directory)
            observer.schedule(_Handler(self, real, None), real, recursive=True, event_filter=_EVENTS)
            for name, (target, _, _) in self._linked.items():
                observer.schedule(_Handler(self, target, name), target, recursive=True, event_filter=_EVENTS)
            observer.start()
        except OSError as error:
            self._give_up(error)
            if observer is not None:
                try:
                    observer.stop()
                except RuntimeError:
                    pass  # it never started
        else:
            self._observer = observer

    def _give_up(self, error: OSError) -> None:
        """Do without events, from now on until the directory is exchanged."""
        if self._observer is not None:
            self._observer.stop()
            self._observer = None
        self._tell(Hint(problem=_explain(error)))

    def _tell(self, hint: Hint) -> None:
        if hint.problem and hint.problem == self._told:
            return
        self._told = hint.problem or self._told
        try:
            self._control.sendall(msgspec.json.encode(hint) + b"\n")
        except OSError:
            os._exit(0)


def _explain(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EMFILE):
        which = "max_user_watches" if error.errno == errno.ENOSPC else "max_user_instances"
        try:
            value = Path(f"/proc/sys/fs/inotify/{which}").read_text().strip()
        except OSError:
            value = "?"
        return (
            f"the system's limit of file watches is reached (fs.inotify.{which} = {value}); changes are looked for "
            f"every {_POLL:g} s instead. Raise it with `sysctl fs.inotify.{which}=…`, or use --poll"
        )
    return f"file events are not available ({error.strerror}); changes are looked for every {_POLL:g} s instead"


def main() -> NoReturn:
    """Entry point of the exec'd process: ``python -I -m hayhost.watcher FD``; the first line on FD is a ``Watch``."""
    if len(sys.argv) != 2 or not sys.argv[1].isdigit():
        sys.stderr.write("This is a part of hayhost that `hayhost serve` starts; it is of no use by itself.\n")
        sys.exit(64)
    control = socket.socket(fileno=int(sys.argv[1]))
    with control.makefile("rb") as lines:
        watch = msgspec.json.decode(lines.readline(), type=Watch)
    os.nice(10)  # seeing a change a moment later matters less than answering requests
    _Watcher(watch, control).run()
    os._exit(0)  # watchdog's threads need no farewell


if __name__ == "__main__":
    main()
