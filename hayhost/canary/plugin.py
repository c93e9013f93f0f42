"""The plugin of `hayhost doctor`: it tries what a plugin must not be able to do, and says how far it got.

Nothing here harms the machine if it succeeds.
"""

import ctypes
import errno
import os
import socket
import tempfile
from collections.abc import Callable

from hayhost.sdk import HayGlobalContext, Request, define_hay_plugin

_libc = ctypes.CDLL(None, use_errno=True)
_X86 = os.uname().machine == "x86_64"


def _syscall(x86_64: int, aarch64: int, *arguments: int) -> None:
    result = _libc.syscall(ctypes.c_long(x86_64 if _X86 else aarch64), *map(ctypes.c_long, arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _read_outside(_: Request) -> None:
    with open("/etc/passwd") as file:
        file.read()


def _write_outside(_: Request) -> None:
    with tempfile.TemporaryFile(dir="/tmp"):
        pass


def _look_at_processes(_: Request) -> None:
    os.listdir("/proc")


def _connect_to_the_host(request: Request) -> None:
    port = int(request.query["port"][0])
    raw = _libc.socket(socket.AF_INET, socket.SOCK_STREAM, 0)  # past Python, as an attacker would
    if raw < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    address = bytes([2, 0]) + port.to_bytes(2, "big") + bytes([127, 0, 0, 1]) + bytes(8)
    try:
        if _libc.connect(raw, address, 16) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(raw)


def _start_a_program(_: Request) -> None:
    pid = _libc.fork()
    if pid == 0:
        _libc._exit(0)
    if pid < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.waitpid(pid, 0)


def _signal_the_host(request: Request) -> None:
    os.kill(int(request.query["pid"][0]), 0)


def _new_user_namespace(_: Request) -> None:
    _syscall(272, 97, 0x10000000)


def _io_uring(_: Request) -> None:
    parameters = ctypes.create_string_buffer(120)
    _syscall(425, 425, 1, ctypes.addressof(parameters))


def _file_in_memory(_: Request) -> None:
    _syscall(319, 279, ctypes.addressof(ctypes.create_string_buffer(b"canary")), 0)


def _watch_outside(_: Request) -> None:
    descriptor = _libc.inotify_init1(0)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        if _libc.inotify_add_watch(descriptor, b"/", 0x100) < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        os.close(descriptor)


_CANARIES: dict[str, Callable[[Request], None]] = {
    "read a file of the machine": _read_outside,
    "write outside of its own folder": _write_outside,
    "list the machine's processes": _look_at_processes,
    "connect to a port of this host": _connect_to_the_host,
    "start a process": _start_a_program,
    "send a signal to the host": _signal_the_host,
    "make a user namespace": _new_user_namespace,
    "use io_uring": _io_uring,
    "make a file in memory": _file_in_memory,
    "watch files of the machine": _watch_outside,
}


@define_hay_plugin
class Canary:
    name = "canary"

    def on_initialize(self, ctx: HayGlobalContext) -> None:
        ctx.register.route("GET", "/", self.try_all)

    async def try_all(self, request: Request) -> list[dict[str, str | None]]:
        """Each attempt, and the name of the error that refused it; none if it succeeded."""
        return [{"attempt": name, "refused": _refusal(attempt, request)} for name, attempt in _CANARIES.items()]


def _refusal(attempt: Callable[[Request], None], request: Request) -> str | None:
    try:
        attempt(request)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "OSError")
    return None
