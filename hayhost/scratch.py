"""Where workers may write: a folder each, made before the worker and gone with it."""

import asyncio
import fcntl
import math
import os
import shutil
import socket
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from sandbox import wire
from sandbox.confinement import Plan
from sandbox.confinement.namespaces import SCRATCH

from .channel import Channel, Exits
from .errors import StartFailedError
from .logs import get_logger

__all__ = ["Doorway", "Folders", "Keeper", "Scratches"]

_PREFIX: Final = "hayhost-scratch-"
_TIMEOUT: Final = 10.0
# Of an empty network of the plugin's own. Not those that the kernel gives to whoever connects, so that none is taken.
_PORTS: Final = range(10_000, 32_000)


@dataclass(frozen=True, slots=True)
class Doorway:
    """Where one worker's programs get to the egress broker: a port in their namespaces, and for the broker its
    socket to the keeper, which hands it what listens there."""

    port: int
    end: socket.socket


class Scratches(Protocol):
    """Makes scratch folders for the workers of one zygote."""

    async def make(self, name: str) -> str:
        """The path of a new, empty folder, as the worker will see it. Raises ``StartFailedError``."""

    def drop(self, name: str) -> None:
        """Remove the folder and what is in it: its worker is gone."""


class Keeper:
    """The front's handle on the keeper of a plugin's namespaces, where each folder is a file system of its own.

    When the keeper hears no more of the front, it ends and all in its namespaces with it.
    """

    def __init__(self, sock: Any, *, proxied: bool = False) -> None:
        self.doorways: dict[str, Doorway] = {}
        """With ``proxied``: that of each worker, by the name of its folder, with which it is made and dropped."""
        self._proxied = proxied
        self._port = 0
        self._waiting: dict[str, asyncio.Future[str]] = {}
        self._made: set[str] = set()
        self._leaving = False
        self.exits = Exits()
        """How processes of the namespaces ended, by their pids in there."""
        self._channel = Channel(
            sock, wire.FromKeeper, hello=lambda pid, message: None, receive=self._receive, closed=self._closed
        )

    async def make(self, name: str) -> str:
        """See ``Scratches.make``."""
        made = self._waiting[name] = asyncio.get_running_loop().create_future()
        self._made.add(name)
        if self._proxied:
            ours, theirs = socket.socketpair()
            self.doorways[name] = Doorway(self._free_port(), ours)
            self._channel.send(wire.MakeScratch(name, self.doorways[name].port), [theirs.detach()])
        else:
            self._channel.send(wire.MakeScratch(name))
        if self._channel.is_closed:
            self._closed("")
        error = "it is not needed any more"
        try:
            async with asyncio.timeout(_TIMEOUT):
                error = await made
        except TimeoutError:
            error = f"none was made within {_TIMEOUT:g} s"
        finally:
            self._waiting.pop(name, None)
            if error:
                self.drop(name)
        if error:
            raise StartFailedError(f"there is no scratch folder for the worker: {error}")
        return f"{SCRATCH}/{name}"

    def _free_port(self) -> int:
        """A port that no living worker has, and that none has had for as long as possible."""
        taken = {doorway.port for doorway in self.doorways.values()}
        while True:
            port = _PORTS[self._port % len(_PORTS)]
            self._port += 1
            if port not in taken:
                return port

    def drop(self, name: str) -> None:
        """See ``Scratches.drop``."""
        self._made.discard(name)
        if doorway := self.doorways.pop(name, None):
            doorway.end.close()
        self._channel.send(wire.DropScratch(name))
        if self._leaving and not self._made:
            self._channel.close()

    def _receive(self, message: wire.ScratchMade | wire.ChildExited | wire.Hello) -> None:
        if isinstance(message, wire.ChildExited):
            self.exits.add(message)
        elif isinstance(message, wire.ScratchMade) and (made := self._waiting.get(message.name)) and not made.done():
            made.set_result(message.error)

    def _closed(self, _reason: str) -> None:
        for made in self._waiting.values():
            if not made.done():
                made.set_result("the plugin's processes have ended")

    def close(self) -> None:
        """Let it end, as soon as the last worker's folder is dropped. Closing twice is safe."""
        self._leaving = True
        if not self._made:
            self._channel.close()


class Folders:
    """Scratch folders in the machine's folder for temporary files, where there are no namespaces.

    Nothing bounds them but the limit on each file and a look at their size now and then: ``oversized``.
    """

    def __init__(self) -> None:
        self.path = ""

    def open(self, *, shared: bool) -> None:
        """Make the folder that they are in, and remove those of hosts that were killed.

        With ``shared`` other users, the plugins' own, may pass through it. Raises ``OSError``.
        """
        base = Path(tempfile.gettempdir())
        for old in base.glob(f"{_PREFIX}*"):
            _remove_if_left(old)
        made = tempfile.mkdtemp(prefix=f".{_PREFIX}", dir=base)
        self._lock = os.open(made, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._mode = 0o711 if shared else 0o700
        os.chmod(made, self._mode)
        self.path = str(base / os.path.basename(made)[1:])
        os.rename(made, self.path)  # only now another host may look whether it is locked

    def add(self) -> str:
        """A new folder for those of one plugin: its zygote may write to all of it. Raises ``OSError``."""
        path = tempfile.mkdtemp(prefix="", dir=self.path)
        os.chmod(path, self._mode)
        return path

    def of(self, plan: Plan) -> "Scratches":
        """Those of the plugin that is confined to ``plan``."""
        return _Owned(self, plan)

    def make(self, path: str, uid: int | None) -> str:
        """See ``Scratches.make``; for a plugin that runs as user ``uid``, or as the host's."""
        try:
            os.mkdir(path, 0o700)
            if uid is not None:
                os.chown(path, uid, uid)
        except OSError as error:
            raise StartFailedError(f"there is no scratch folder for the worker: {error.strerror}") from None
        return path

    def drop(self, path: str) -> None:
        """See ``Scratches.drop``."""
        try:
            os.rmdir(path)  # most are empty
        except OSError:
            asyncio.get_running_loop().run_in_executor(None, _remove, path)

    def size(self, path: str) -> float:
        """Bytes that the folder ``path`` takes on the disk; infinitely many if the plugin has hidden some."""
        total = 0
        pending = [path]
        while pending:
            try:
                entries = list(os.scandir(pending.pop()))
            except FileNotFoundError:
                continue  # gone meanwhile
            except OSError:  # not to be read, or nested deeper than a path is long
                return math.inf
            for entry in entries:
                try:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                except FileNotFoundError:
                    continue
                except OSError:
                    return math.inf
        return total

    def close(self) -> None:
        """Remove them all. Closing twice is safe."""
        if self.path:
            _remove(self.path)
            os.close(self._lock)
            self.path = ""


class _Owned:
    def __init__(self, folders: Folders, plan: Plan) -> None:
        self._folders = folders
        self._plan = plan

    async def make(self, name: str) -> str:
        return self._folders.make(f"{self._plan.scratch}/{name}", self._plan.uid)

    def drop(self, name: str) -> None:
        self._folders.drop(f"{self._plan.scratch}/{name}")


def _remove(path: str) -> None:
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError):  # a plugin may nest folders deeper than Python can follow
        _open_all(path)
        done = subprocess.run(["/bin/rm", "-rf", "--one-file-system", path], stderr=subprocess.DEVNULL, check=False)
        if done.returncode:
            get_logger().warning("a scratch folder could not be removed", folder=path)


def _open_all(path: str) -> None:
    """Give back the rights without which the plugin has made folders, so that they can be removed."""
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:  # by descriptor: the plugin's zygote may put a link in the place of the folder
        command = ["/bin/chmod", "-R", "u+rwX", "."]
        subprocess.run(command, cwd=f"/proc/self/fd/{folder}", stderr=subprocess.DEVNULL, check=False)
    finally:
        os.close(folder)


def _remove_if_left(folder: Path) -> None:
    """Remove a folder of scratch folders unless its host still holds the lock on it."""
    try:
        if folder.stat(follow_symlinks=False).st_uid != os.geteuid():
            return
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return  # that host runs
    else:
        _remove(str(folder))
    finally:
        os.close(lock)
