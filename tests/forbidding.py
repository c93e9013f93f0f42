"""A small seccomp filter for tests: no socket may be made, connected or listened on, whatever Python is told."""

import ctypes
import platform
import struct

__all__ = ["SUPPORTED", "forbid_sockets"]

SUPPORTED = platform.machine() == "x86_64"
_SOCKETPAIR = 53
_REFUSED = (41, 42, 43, 49, 50, 288)  # socket, connect, accept, bind, listen, accept4
_LOAD, _EQUAL, _MASK, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW, _EPERM = 0x7FFF0000, 0x00050001


def forbid_sockets() -> None:
    """Let nothing make a socket in this process any more but ``socketpair(AF_UNIX, SOCK_STREAM)``."""
    program: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, 0)]
    for number in _REFUSED:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    program += [
        (_EQUAL, 1, 0, _SOCKETPAIR),
        (_RETURN, 0, 0, _ALLOW),
        (_LOAD, 0, 0, 16),  # the family
        (_EQUAL, 1, 0, 1),
        (_RETURN, 0, 0, _EPERM),
        (_LOAD, 0, 0, 24),  # the type
        (_MASK, 0, 0, 0xF),
        (_EQUAL, 1, 0, 1),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]
    data = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program), ctypes.addressof(data)))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, argument, more in ((38, ctypes.c_ulong(1), None), (22, ctypes.c_ulong(2), header)):
        if libc.prctl(option, argument, more, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")
