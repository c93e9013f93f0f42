"""Namespaces: a process tree of its own, an empty network, and a root that holds nothing but what a plugin may see.

``unshare`` is called first and puts the next child that is forked at the head of its own process tree. That child
calls ``enter``, which builds the private root: a read-only tmpfs with the readable trees mounted at their own paths,
read-only as well, a few devices, and nothing else. There is no /proc in it.
"""

import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from typing import Final

from . import kernel

__all__ = ["SCRATCH", "Scratches", "enter", "outermost", "raise_loopback", "unshare"]

SCRATCH: Final = "/scratch"
"""Where the workers' scratch folders are in a private root."""

_CLONE_NEWNS, _CLONE_NEWCGROUP, _CLONE_NEWUTS, _CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
_CLONE_NEWUSER, _CLONE_NEWPID, _CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
_ALL: Final = _CLONE_NEWNS | _CLONE_NEWCGROUP | _CLONE_NEWUTS | _CLONE_NEWIPC | _CLONE_NEWPID | _CLONE_NEWNET

# The same numbers on every architecture.
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_OPEN_TREE_CLONE, _OPEN_TREE_CLOEXEC, _AT_RECURSIVE, _AT_EMPTY_PATH = 1, os.O_CLOEXEC, 0x8000, 0x1000
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}
_AT_FDCWD: Final = -100
_RDONLY, _NOSUID, _NODEV = 1, 2, 4  # as MOUNT_ATTR_* and as MS_*
_MS_REMOUNT, _MS_NOATIME, _MS_BIND, _MS_REC, _MS_PRIVATE = 32, 1024, 4096, 16384, 1 << 18
_MNT_DETACH: Final = 2

_SIOCSIFFLAGS: Final = 0x8914  # netdevice(7)
_IFF_UP: Final = 1

_DEVICES: Final = tuple(f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom"))
_ROOT_OPTIONS: Final = "mode=755,size=1m,nr_inodes=4k"


def unshare() -> None:
    """Leave the namespaces of the host, all but the time. Raises ``OSError`` where that is not allowed.

    Without the privilege for it a user namespace comes first, in which this process is still its own user.
    """
    uid, gid = os.geteuid(), os.getegid()
    try:
        _unshare(_ALL)
    except PermissionError:
        _unshare(_ALL | _CLONE_NEWUSER)
        for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{file}", "w") as map:
                map.write(text)


def _unshare(flags: int) -> None:
    if hasattr(os, "unshare"):
        os.unshare(flags)
    else:
        kernel.syscall({"x86_64": 272, "aarch64": 97}[os.uname().machine], flags)


def raise_loopback() -> None:
    """Have the loopback interface of this network carry something. There is no other one in a new network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH22x", b"lo", _IFF_UP))


def enter(trees: Iterable[str], writable: Iterable[str] = ()) -> None:
    """Make a new root of ``trees`` and ``writable``, folders or files, and change into it.

    Names that lead there through symbolic links do so in the new root as well. What does not exist is left out.
    """
    kernel.mount(None, "/", None, _MS_REC | _MS_PRIVATE)
    root = "/tmp"  # any folder that exists: it is covered in this namespace only
    links: dict[str, str] = {}
    sources: dict[str, tuple[int, bool, int]] = {}
    for paths, attributes in ((trees, _RDONLY | _NOSUID | _NODEV), (_DEVICES, _NOSUID), (writable, _NOSUID | _NODEV)):
        for path in outermost(_resolve(path, links) for path in paths):
            if os.path.exists(path):
                descriptor = _clone(path)
                sources[path] = descriptor, os.path.isdir(path), attributes
    kernel.mount("tmpfs", root, "tmpfs", _NOSUID | _NODEV, _ROOT_OPTIONS)
    for path in sorted(sources, key=len):
        descriptor, is_folder, attributes = sources[path]
        _make_place(root + path, is_folder)
        _set_attributes(descriptor, attributes)
        kernel.syscall(_MOVE_MOUNT, descriptor, b"", _AT_FDCWD, os.fsencode(root + path), _MOVE_MOUNT_F_EMPTY_PATH)
        os.close(descriptor)
    for path, target in links.items():
        if not os.path.lexists(root + path):
            os.makedirs(os.path.dirname(root + path), exist_ok=True)
            os.symlink(target, root + path)
    os.makedirs(root + SCRATCH, exist_ok=True)
    os.chdir(root)
    kernel.syscall(_PIVOT_ROOT[os.uname().machine], b".", b".")
    _detach(".")
    kernel.mount(None, "/", None, _MS_REMOUNT | _MS_BIND | _RDONLY | _NOSUID | _NODEV)
    os.chdir("/")
    _set_host_name()


def _set_host_name() -> None:
    try:
        kernel.syscall({"x86_64": 170, "aarch64": 161}[os.uname().machine], b"plugin", 6)
    except OSError:
        pass  # a name is no layer


def _resolve(path: str, links: dict[str, str]) -> str:
    """The real path of ``path``; every symbolic link on the way there is added to ``links``."""
    done = ""
    rest = [part for part in path.split("/") if part]
    for _ in range(1000):
        if not rest:
            return done or "/"
        part = rest.pop(0)
        if part == ".":
            continue
        if part == "..":
            done = os.path.dirname(done) if done != "/" else done
            continue
        here = f"{done}/{part}"
        try:
            target = os.readlink(here)
        except OSError:
            done = here
            continue
        links[here] = target
        rest[:0] = [part for part in target.split("/") if part]
        if target.startswith("/"):
            done = ""
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), path)


def outermost(paths: Iterable[str]) -> Iterator[str]:
    """``paths`` without those that are below another of them."""
    last = ""
    for path in sorted(set(paths), key=lambda path: path.split("/")):
        if not last or not (path + "/").startswith(last + "/"):
            last = path
            yield path


def _clone(path: str) -> int:
    flags = _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_RECURSIVE
    return kernel.syscall(_OPEN_TREE, _AT_FDCWD, os.fsencode(path), flags)


def _set_attributes(descriptor: int, attributes: int) -> None:
    change = struct.pack("=QQQQ", attributes, 0, 0, 0)
    kernel.syscall(_MOUNT_SETATTR, descriptor, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, change, len(change))


def _make_place(path: str, is_folder: bool) -> None:
    if os.path.exists(path):  # in a tree that is mounted already
        return
    if is_folder:
        os.makedirs(path, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "x"):
            pass


def _detach(path: str) -> None:
    number = {"x86_64": 166, "aarch64": 39}[os.uname().machine]
    kernel.syscall(number, os.fsencode(path), _MNT_DETACH)


class Scratches:
    """The scratch folders in a private root: each is a tmpfs of its own, of bounded size, below ``SCRATCH``.

    ``SCRATCH`` itself is read-only for all but this object, which holds the folder as it was before.
    """

    def __init__(self, size: int, uid: int, gid: int) -> None:
        self._options = f"size={size},nr_inodes={max(64, size >> 14)},mode=700,uid={uid},gid={gid}"
        kernel.mount("tmpfs", SCRATCH, "tmpfs", _NOSUID | _NODEV, "mode=711,size=1m")
        self.folder = os.open(SCRATCH, os.O_RDONLY | os.O_DIRECTORY)
        kernel.mount(SCRATCH, SCRATCH, None, _MS_BIND)
        kernel.mount(None, SCRATCH, None, _MS_REMOUNT | _MS_BIND | _RDONLY | _NOSUID | _NODEV)

    def make(self, name: str) -> None:
        """Make the folder ``name``, empty. Raises ``OSError``."""
        os.mkdir(name, 0o711, dir_fd=self.folder)
        kernel.mount("tmpfs", f"{SCRATCH}/{name}", "tmpfs", _NOSUID | _NODEV, self._options)

    def drop(self, name: str) -> None:
        """Let go of the folder ``name``: what is in it is gone with the last process that uses it."""
        try:
            _detach(f"{SCRATCH}/{name}")
            os.rmdir(name, dir_fd=self.folder)
        except OSError:
            pass  # it never was, or is gone already
