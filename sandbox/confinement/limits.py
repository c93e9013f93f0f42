"""Resource limits of one process (setrlimit(2)): what a bomb can take before the kernel says no."""

import resource
from typing import Final

__all__ = ["Limits", "apply", "limits_of"]

Limits = tuple[tuple[int, int], ...]
"""``(resource, most)`` for each limit, soft and hard alike."""

# Address space is not memory: threads reserve stacks, allocators arenas, and numeric libraries a great deal.
_ADDRESS_FACTOR: Final = 4
_ADDRESS_EXTRA: Final = 4 << 30
# Private writable mappings include the stacks that 256 threads of a worker reserve, and hardly ever use.
_DATA_EXTRA: Final = 512 << 20

# By number: the resource module of some Pythons has no names for them.
_SIGPENDING: Final = 11
_MSGQUEUE: Final = 12
_NICE: Final = 13
_RTPRIO: Final = 14


def limits_of(*, memory: int, files: int, file_size: int, cpu_seconds: int | None, processes: int | None) -> Limits:
    """The limits of a zygote and its workers. Sizes are in bytes; ``None`` sets no limit.

    ``processes`` counts all processes of the user, or of its user namespace: it is only of use where that is the
    plugin's own.
    """
    limits = {
        resource.RLIMIT_AS: _ADDRESS_FACTOR * memory + _ADDRESS_EXTRA,
        resource.RLIMIT_DATA: memory + _DATA_EXTRA,
        resource.RLIMIT_NOFILE: files,
        resource.RLIMIT_FSIZE: file_size,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 64 << 10,
        _SIGPENDING: 1024,
        _MSGQUEUE: 0,
        _NICE: 0,
        _RTPRIO: 0,
    }
    if cpu_seconds is not None:
        limits[resource.RLIMIT_CPU] = cpu_seconds
    if processes is not None:
        limits[resource.RLIMIT_NPROC] = processes
    return tuple(limits.items())


def apply(limits: Limits) -> None:
    """Set them for this process and all that follow from it. One that is tighter already stays."""
    for kind, most in limits:
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (least, least))
