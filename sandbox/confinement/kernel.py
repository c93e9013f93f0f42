"""System calls that Python has no function for, by ctypes: each raises ``OSError`` with the kernel's own reason."""

import ctypes
import os

__all__ = ["mount", "prctl", "syscall"]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def syscall(number: int, *arguments: object) -> int:
    """System call ``number``. Integers are passed as 64 bits, everything else as ctypes does."""
    return _checked(_libc.syscall(ctypes.c_long(number), *map(_argument, arguments)))


def _argument(value: object) -> object:
    return ctypes.c_long(value) if isinstance(value, int) else value


def prctl(option: int, *arguments: object) -> int:
    """prctl(2), with the unused arguments zero."""
    given = [*map(_argument, arguments), *[ctypes.c_long(0)] * (4 - len(arguments))]
    return _checked(_libc.prctl(option, *given))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2)."""
    _checked(
        _libc.mount(
            source.encode() if source is not None else None,
            os.fsencode(target),
            kind.encode() if kind is not None else None,
            ctypes.c_ulong(flags),
            options.encode() or None,
        )
    )
