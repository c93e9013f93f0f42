"""Inherited file descriptors: a child keeps the ones it is named and no other."""

import os

__all__ = ["close_all_but"]

_FIRST = 3  # 0, 1 and 2 are the standard streams


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor above 2 that is not in ``keep``."""
    low = _FIRST
    for descriptor in sorted(fd for fd in keep if fd >= _FIRST):
        os.closerange(low, descriptor)
        low = descriptor + 1
    os.closerange(low, os.sysconf("SC_OPEN_MAX"))
