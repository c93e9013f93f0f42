"""Landlock: which files a process may open, write and execute, and that it reaches no TCP port but one that is
granted, no abstract socket and no process outside of its domain (landlock(7)). Unprivileged, and for good."""

import functools
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from . import kernel

__all__ = ["CONNECT_GOVERNED", "SIGNALS_SCOPED", "TRUNCATE_GOVERNED", "Ruleset", "abi"]

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_VERSION_FLAG: Final = 1
_PATH_BENEATH: Final = 1
_NET_PORT: Final = 2

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_TRUNCATE: Final = 1 << 14
_IOCTL_DEVICE: Final = 1 << 15
_FILE_RIGHTS: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
# By ABI: rights on files, rights on TCP, scopes. A kernel refuses the ones that it does not know.
_FILES: Final = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 5: 1 << 16}
_NET: Final = {4: 0b11}
_CONNECT: Final = 0b10
_SCOPES: Final = {6: 0b11}
# Devices and sockets are made nowhere: bits 6, 9 and 11.
_MAKE_SPECIAL: Final = 1 << 6 | 1 << 9 | 1 << 11

TRUNCATE_GOVERNED: Final = 3
"""The ABI from which ``truncate`` needs a right."""
CONNECT_GOVERNED: Final = 4
"""The ABI from which connecting to a TCP port needs a right."""
SIGNALS_SCOPED: Final = 6
"""The ABI from which signals and abstract sockets stay within the domain."""


@functools.cache
def abi() -> int:
    """The version of Landlock that this kernel has; 0 if it has none or does not use it."""
    try:
        return kernel.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def _newest(by_abi: dict[int, int], version: int) -> int:
    return max((value for since, value in by_abi.items() if since <= version), default=0)


class Ruleset:
    """One layer of Landlock in the making: what is not granted before ``restrict`` is refused after it.

    Every right that the kernel knows is refused where it is not granted. With ``connects`` this layer leaves it to
    later ones which TCP ports may be connected to. Whoever makes it raises ``OSError`` without Landlock.
    """

    def __init__(self, *, connects: bool = False) -> None:
        version = abi()
        self._handled = _newest(_FILES, version) - 1
        ports = _newest(_NET, version) & ~(_CONNECT if connects else 0)
        attributes = struct.pack("=QQQ", self._handled, ports, _newest(_SCOPES, version))
        size = 8 if version < 4 else 16 if version < SIGNALS_SCOPED else 24
        self._descriptor = kernel.syscall(_CREATE_RULESET, attributes, size, 0)

    def grant(self, readable: Iterable[str] = (), writable: Iterable[str] = (), executable: Iterable[str] = ()) -> None:
        """``readable`` and ``writable`` are trees or single files, ``executable`` files; who may write may read.

        Paths that do not exist grant nothing.
        """
        read = _READ_FILE | _READ_DIR
        write = read | self._handled & ~(_EXECUTE | _MAKE_SPECIAL | _IOCTL_DEVICE)
        for paths, rights in ((readable, read), (writable, write), (executable, _EXECUTE | _READ_FILE)):
            for path in paths:
                self._grant(path, rights)

    def grant_connecting(self, port: int) -> None:
        """TCP connections to ``port``, of whatever host."""
        kernel.syscall(_ADD_RULE, self._descriptor, _NET_PORT, struct.pack("=QQ", _CONNECT, port), 0)

    def _grant(self, path: str, rights: int) -> None:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if not stat.S_ISDIR(os.fstat(place).st_mode):
                rights &= _FILE_RIGHTS
            kernel.syscall(_ADD_RULE, self._descriptor, _PATH_BENEATH, struct.pack("=Qi", rights, place), 0)
        finally:
            os.close(place)

    def restrict(self) -> None:
        """Put this thread, and all that follow from it, under it for good, once. Raises ``OSError``."""
        try:
            kernel.syscall(_RESTRICT_SELF, self._descriptor, 0)
        finally:
            self.close()

    def close(self) -> None:
        """Let go of it, in this process. Closing twice is safe."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
