"""Landlock: which files a process may open, write and execute, and that it reaches no TCP port, no abstract socket and
no process outside of its domain (landlock(7)). Unprivileged, and for good."""

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from typing import Final

from . import kernel

__all__ = ["SIGNALS_SCOPED", "TRUNCATE_GOVERNED", "abi", "restrict"]

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # on every architecture
_VERSION_FLAG: Final = 1
_PATH_BENEATH: Final = 1

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = (1 << bit for bit in range(4))
_TRUNCATE: Final = 1 << 14
_IOCTL_DEVICE: Final = 1 << 15
_FILE_RIGHTS: Final = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE
# By ABI: rights on files, rights on TCP, scopes. A kernel refuses the ones that it does not know.
_FILES: Final = {1: 1 << 13, 2: 1 << 14, 3: 1 << 15, 5: 1 << 16}
_NET: Final = {4: 0b11}
_SCOPES: Final = {6: 0b11}
# Devices and sockets are made nowhere: bits 6, 9 and 11.
_MAKE_SPECIAL: Final = 1 << 6 | 1 << 9 | 1 << 11

TRUNCATE_GOVERNED: Final = 3
"""The ABI from which ``truncate`` needs a right."""
SIGNALS_SCOPED: Final = 6
"""The ABI from which signals and abstract sockets stay within the domain."""


def abi() -> int:
    """The version of Landlock that this kernel has; 0 if it has none or does not use it."""
    try:
        return kernel.syscall(_CREATE_RULESET, None, 0, _VERSION_FLAG)
    except OSError:
        return 0


def _newest(by_abi: dict[int, int], version: int) -> int:
    return max((value for since, value in by_abi.items() if since <= version), default=0)


def restrict(readable: Iterable[str], writable: Iterable[str] = (), executable: Iterable[str] = ()) -> None:
    """Put this thread, and all that follow from it, under one more layer of Landlock.

    ``readable`` and ``writable`` are trees or single files, ``executable`` files. Whatever is not named is refused, and
    every right that the kernel knows is refused where it is not granted. Paths that do not exist grant nothing. Raises
    ``OSError`` without Landlock.
    """
    version = abi()
    handled = _newest(_FILES, version) - 1
    attributes = struct.pack("=QQQ", handled, _newest(_NET, version), _newest(_SCOPES, version))
    size = 8 if version < 4 else 16 if version < SIGNALS_SCOPED else 24
    ruleset = kernel.syscall(_CREATE_RULESET, attributes, size, 0)
    try:
        read = _READ_FILE | _READ_DIR
        write = handled & ~(_EXECUTE | _MAKE_SPECIAL | _IOCTL_DEVICE)
        for paths, rights in ((readable, read), (writable, write), (executable, _EXECUTE | _READ_FILE)):
            for path in paths:
                _grant(ruleset, path, rights)
        kernel.syscall(_RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)


def _grant(ruleset: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", rights, place))
        kernel.syscall(_ADD_RULE, ruleset, _PATH_BENEATH, rule, 0)
    finally:
        os.close(place)
