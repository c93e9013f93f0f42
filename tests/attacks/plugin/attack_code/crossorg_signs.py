"""Cross-org: signs of one bit or a few, on files that all workers of a plugin may read, and by way of the host."""

import array
import asyncio
import ctypes
import fcntl
import os
import socket
import struct
from pathlib import Path
from typing import Any

from .harness import Refused, Victims, attack, call, libc
from .network import find_link

_KEEP: list[Any] = []
_OWN = Path(__file__).parent.parent / "data.txt"


def _sign(v: Victims, held: Any) -> str:
    """The one holds something, the other sees that it is held."""
    descriptor = os.open(_OWN, os.O_RDONLY)
    _KEEP.append(descriptor)
    if v.stage == "leave":
        held(descriptor)
        return "left"
    try:
        held(descriptor)
    except BlockingIOError:
        return "it is held"
    raise Refused("it is free")


@attack("Locks the plugin's own file, which another org's worker sees", stages=True)
def sign_by_lock(v: Victims) -> str:
    return _sign(v, lambda descriptor: fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB))


@attack("Locks a part of the plugin's own file for reading, which another org's worker sees", stages=True)
def sign_by_record_lock(v: Victims) -> str:
    descriptor = os.open(_OWN, os.O_RDONLY)
    _KEEP.append(descriptor)
    if v.stage == "leave":
        return f"{fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1)}"
    asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 1, 0)
    kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    if kind == fcntl.F_UNLCK:
        raise Refused("it is free")
    return f"held by {pid}"


@attack("Locks the interpreter's file, which every plugin's worker sees", stages=True)
def sign_by_lock_elsewhere(v: Victims) -> str:
    descriptor = os.open(os.path.realpath(os.__file__), os.O_RDONLY)
    _KEEP.append(descriptor)
    if v.stage == "leave":
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "done"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return "it is held"
    raise Refused("it is free")


@attack("Writes to the times of the plugin's own file, which another org's worker reads", stages=True)
def sign_by_times(v: Victims) -> str:
    if v.stage == "leave":
        number = int(v.token[:6], 16)
        os.utime(_OWN, (number, number))
        return f"{number}"
    if str(found := int(_OWN.stat().st_mtime)) != v.left:
        raise Refused(f"it says {found}")
    return f"{found}"


@attack(
    "Writes to an extended attribute of the plugin's own file, which another org's worker reads",
    stages=True,
    harm="loot",
)
def sign_by_attribute(v: Victims) -> str:
    if v.stage == "leave":
        os.setxattr(_OWN, "user.sign", v.token.encode())
        return "done"
    return os.getxattr(_OWN, "user.sign").decode()


@attack("Passes a descriptor to the host in the hope that it hands it on", stages=True, harm="loot", host=True)
def sign_by_passing(v: Victims) -> str:
    sock = socket.socket(fileno=os.dup(find_link()))
    if v.stage == "leave":
        reading, writing = os.pipe()
        os.write(writing, v.token.encode())
        return str(sock.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [reading]))]))
    _, descriptors, _, _ = socket.recv_fds(sock, 0, 4, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    if not descriptors:
        raise Refused("none came")
    return os.read(descriptors[0], 64).decode()


@attack("Waits for a futex in the plugin's own file, which another org's worker wakes", stages=True)
def sign_by_futex(v: Victims) -> str:
    descriptor = os.open(_OWN, os.O_RDONLY)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(4096), 1, 1, descriptor, ctypes.c_long(0))
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    word = ctypes.c_uint32.from_address(address).value
    if v.stage == "leave":
        patience = struct.pack("qq", 5, 0)
        waiting = asyncio.get_running_loop().run_in_executor(None, call, "futex", address, 0, word, patience)
        _KEEP.append(waiting)
        waiting.add_done_callback(lambda future: future.exception())
        return "left"
    for _ in range(200):  # the thread of the other may not have come to it yet
        if call("futex", address, 1, 1) > 0:
            return "somebody was waiting"
        libc.usleep(5_000)
    raise Refused("nobody is waiting")
