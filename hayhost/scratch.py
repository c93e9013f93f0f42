"""Where workers may write: a folder each, made before the worker and gone with it."""

import asyncio
import fcntl
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final, Protocol

from sandbox import wire
from sandbox.confinement.namespaces import SCRATCH

from .channel import Channel
from .errors import StartFailedError
from .logs import get_logger

__all__ = ["Folders", "Keeper", "Scratches"]

_PREFIX: Final = "hayhost-scratch-"
_TIMEOUT: Final = 10.0


class Scratches(Protocol):
    """Makes scratch folders for the workers of one zygote."""

    async def make(self, name: str) -> str:
        """The path of a new, empty folder, as the worker will see it. Raises ``StartFailedError``."""

    def drop(self, name: str) -> None:
        """Remove the folder and what is in it: its worker is gone."""


class Keeper:
    """The front's handle on the keeper of a plugin's namespaces, where each folder is a file system of its own."""

    def __init__(self, sock: Any) -> None:
        self._waiting: dict[str, asyncio.Future[str]] = {}
        self._channel = Channel(
            sock, wire.FromKeeper, hello=lambda pid, message: None, receive=self._receive, closed=self._closed
        )

    async def make(self, name: str) -> str:
        """See ``Scratches.make``."""
        made = self._waiting[name] = asyncio.get_running_loop().create_future()
        self._channel.send(wire.MakeScratch(name))
        if self._channel.is_closed:
            self._closed("")
        try:
            async with asyncio.timeout(_TIMEOUT):
                error = await made
        except TimeoutError:
            error = f"none was made within {_TIMEOUT:g} s"
        finally:
            self._waiting.pop(name, None)
        if error:
            raise StartFailedError(f"there is no scratch folder for the worker: {error}")
        return f"{SCRATCH}/{name}"

    def drop(self, name: str) -> None:
        """See ``Scratches.drop``."""
        self._channel.send(wire.DropScratch(name))

    def _receive(self, message: wire.ScratchMade | wire.Hello) -> None:
        if isinstance(message, wire.ScratchMade) and (made := self._waiting.get(message.name)) and not made.done():
            made.set_result(message.error)

    def _closed(self, _reason: str) -> None:
        for made in self._waiting.values():
            if not made.done():
                made.set_result("the plugin's processes have ended")

    def close(self) -> None:
        """Let go of it; it leaves when the last process that it keeps has gone. Closing twice is safe."""
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
        os.chmod(made, 0o711 if shared else 0o700)
        self.path = str(base / os.path.basename(made)[1:])
        os.rename(made, self.path)  # only now another host may look whether it is locked

    def of(self, uid: int | None) -> "Scratches":
        """Those of a plugin that runs as user ``uid``, or as the host's."""
        return _Owned(self, uid)

    def make(self, name: str, uid: int | None) -> str:
        """See ``Scratches.make``."""
        path = f"{self.path}/{name}"
        try:
            os.mkdir(path, 0o700)
            if uid is not None:
                os.chown(path, uid, uid)
        except OSError as error:
            raise StartFailedError(f"there is no scratch folder for the worker: {error.strerror}") from None
        return path

    def drop(self, name: str) -> None:
        """See ``Scratches.drop``."""
        path = f"{self.path}/{name}"
        try:
            os.rmdir(path)  # most are empty
        except OSError:
            asyncio.get_running_loop().run_in_executor(None, _remove, path)

    def size(self, name: str) -> int:
        """Bytes that the folder ``name`` takes on the disk."""
        total = 0
        pending = [f"{self.path}/{name}"]
        while pending:
            try:
                entries = list(os.scandir(pending.pop()))
            except OSError:
                continue
            for entry in entries:
                try:
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(entry.path)
                except OSError:
                    continue
        return total

    def close(self) -> None:
        """Remove them all. Closing twice is safe."""
        if self.path:
            _remove(self.path)
            os.close(self._lock)
            self.path = ""


class _Owned:
    def __init__(self, folders: Folders, uid: int | None) -> None:
        self._folders = folders
        self._uid = uid

    async def make(self, name: str) -> str:
        return self._folders.make(name, self._uid)

    def drop(self, name: str) -> None:
        self._folders.drop(name)


def _remove(path: str) -> None:
    try:
        shutil.rmtree(path)
    except (OSError, RecursionError):  # a plugin may nest folders deeper than Python can follow
        done = subprocess.run(["/bin/rm", "-rf", "--one-file-system", path], stderr=subprocess.DEVNULL, check=False)
        if done.returncode:
            get_logger().warning("a scratch folder could not be removed", folder=path)


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
