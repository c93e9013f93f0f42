"""What a process may do beyond its user: given up for good, for itself and every program it will ever execute."""

import ctypes
import os
from typing import Final

from . import kernel

__all__ = ["become", "drop_capabilities", "forbid_new"]

_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPSET: Final = {"x86_64": 126, "aarch64": 91}
_CAPABILITY_VERSION_3: Final = 0x20080522
_MOST_CAPABILITIES: Final = 64


def forbid_new() -> None:
    """Set ``no_new_privs``: no set-user-id program or file capability gives anything any more."""
    kernel.prctl(_PR_SET_NO_NEW_PRIVS, 1)


def become(uid: int) -> None:
    """Be user and group ``uid``, in no other group. For root only. Clears the dumpable flag as well."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def drop_capabilities(keep: int = 0) -> None:
    """Give up every capability that is not in the bit set ``keep``."""
    try:
        kernel.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        for capability in range(_MOST_CAPABILITIES):
            if not keep >> capability & 1:
                kernel.prctl(_PR_CAPBSET_DROP, capability)
    except OSError:
        pass  # past the last one, or no right to shrink the bounding set: then there is nothing in it to gain
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    low, high = keep & 0xFFFFFFFF, keep >> 32
    kernel.syscall(_CAPSET[os.uname().machine], header, (ctypes.c_uint32 * 6)(low, low, 0, high, high, 0))
