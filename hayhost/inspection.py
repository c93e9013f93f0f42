"""The front's look at a new worker from outside, before it is told whose it is.

Code in a zygote can do as it likes between the fork and the worker's first frame, and say what it likes about it. What
the kernel says of the process it cannot change.
"""

import ctypes
import errno
import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterator
from typing import Final

from sandbox.confinement import Plan

__all__ = ["Descriptors", "inspect", "pid_inside", "threads_of"]

Descriptors = frozenset[tuple[int, int]]
"""Device and inode of each of a worker's descriptors that the front has made."""

_NULL: Final = os.makedev(1, 3)
# address permissions offset device inode path
_SHARED: Final = re.compile(rb"^\S+ ..\Ss \S+ (\S+) (\d+) *(.*)$", re.MULTILINE)
_SHMEM: Final = (0, 1)  # the kernel's own file system for memory without a name
# ioctl_procfs(2): PROCMAP_QUERY asks for the next mapping of a kind, where the text has them all.
_PROCMAP_QUERY: Final = 0xC0686611
_QUERY: Final = struct.Struct("=9Q4I2Q")
_QUERY_SHARED, _QUERY_NEXT = 0x08, 0x10
_NAME: Final = 4096
_FILTERS: Final = 2  # the zygote's and the worker's own


class _Status:
    """What the kernel says of a process, read at once (proc_pid_status(5))."""

    def __init__(self, pid: int) -> None:
        descriptor = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._text = os.read(descriptor, 1 << 16)
        finally:
            os.close(descriptor)

    def __getitem__(self, name: bytes) -> bytes:
        _, found, rest = self._text.partition(b"\n%s:\t" % name)
        if not found:
            raise KeyError(name.decode())
        return rest.partition(b"\n")[0]


def threads_of(pid: int) -> int:
    """How many threads a process has; 1 where the kernel does not say."""
    try:
        return int(_Status(pid)[b"Threads"])
    except (OSError, KeyError, ValueError):
        return 1


def pid_inside(pid: int) -> int:
    """The id of process ``pid`` in its own pid namespace; ``pid`` itself where the kernel does not say."""
    try:
        return int(_Status(pid)[b"NSpid"].split()[-1])
    except (OSError, KeyError, ValueError, IndexError):
        return pid


def inspect(pid: int, plan: Plan, expected: Descriptors, threads: int) -> str:
    """What is wrong with the worker ``pid``, for an error message; empty if it is as ``plan`` wants it.

    ``threads`` is how many it may have: more than one only if it shares nothing with other workers.
    """
    try:
        return _state(pid, plan, threads) or _descriptors(pid, expected) or _memory(pid, plan)
    except (OSError, KeyError, ValueError) as error:
        return f"it cannot be inspected: {error}"


def _state(pid: int, plan: Plan, threads: int) -> str:
    status = _Status(pid)
    if (count := int(status[b"Threads"])) > threads:
        return f"it has {count} threads before it was told to start any"
    if int(status[b"CapPrm"], 16) or int(status[b"CapEff"], 16):
        return "it has privileges that it was to give up"
    if status[b"NoNewPrivs"] != b"1":
        return "it may gain privileges"
    if plan.uid is not None and set(map(int, status[b"Uid"].split() + status[b"Gid"].split())) != {plan.uid}:
        return "it does not run as its own user"
    if "seccomp" in plan.layers and (status[b"Seccomp"] != b"2" or _filters(status) < _FILTERS):
        return "its system calls are not filtered as they should be"
    return ""


def _filters(status: _Status) -> int:
    try:
        return int(status[b"Seccomp_filters"])
    except KeyError:
        return _FILTERS  # before Linux 5.9 it is not said


def _descriptors(pid: int, expected: Descriptors) -> str:
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        try:
            status = os.stat(path)
        except FileNotFoundError:
            continue  # closed meanwhile
        if (status.st_dev, status.st_ino) in expected or (stat.S_ISCHR(status.st_mode) and status.st_rdev == _NULL):
            continue
        return f"it has an open descriptor of its zygote's ({os.readlink(path)})"
    return ""


def _memory(pid: int, plan: Plan) -> str:
    scratch = os.fsencode(plan.scratch)
    for device, inode, path in _shared(pid):
        # A file that could be opened for reading only cannot become writable memory; anything else can.
        if not inode or device == _SHMEM or path.endswith(b" (deleted)") or (scratch and scratch in path):
            return (
                f"importing the plugin left memory that all its workers would share ({path.decode(errors='replace')}); "
                "make shared memory in on_start or later"
            )
    return ""


def _shared(pid: int) -> Iterator[tuple[tuple[int, int], int, bytes]]:
    """The shared mappings of a process: device, inode and name of what is mapped."""
    maps = os.open(f"/proc/{pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    name = ctypes.create_string_buffer(_NAME)
    at = 0
    try:
        while True:
            flags = _QUERY_NEXT | _QUERY_SHARED
            query = bytearray(_QUERY.pack(_QUERY.size, flags, at, *[0] * 6, 0, 0, _NAME, 0, ctypes.addressof(name), 0))
            fcntl.ioctl(maps, _PROCMAP_QUERY, query)
            _, _, _, _, at, _, _, _, inode, major, minor, length, *_ = _QUERY.unpack(query)
            yield (major, minor), inode, name.raw[: max(0, length - 1)]
    except OSError as error:
        if error.errno == errno.ENOTTY:  # before Linux 6.11: all mappings as text
            yield from _shared_of_text(maps)
        elif error.errno != errno.ENOENT:  # there is no further one
            raise
    finally:
        os.close(maps)


def _shared_of_text(maps: int) -> Iterator[tuple[tuple[int, int], int, bytes]]:
    text = bytearray()
    while data := os.read(maps, 1 << 20):
        text += data
    for device, inode, path in _SHARED.findall(text):
        major, _, minor = device.partition(b":")
        yield (int(major, 16), int(minor, 16)), int(inode), path
