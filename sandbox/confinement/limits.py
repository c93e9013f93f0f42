"""Resource limits of one process (setrlimit(2)): what a bomb can take before the kernel says no."""

import resource
from typing import Final

__all__ = ["Limits", "apply", "limits_of"]

Limits = tuple[tuple[int, int], ...]
"""``(resource, most)`` for each limit, soft and hard alike but for processor time."""

# Address space is not memory: threads reserve stacks, allocators arenas, and numeric libraries a great deal.
_ADDRESS_FACTOR: Final = 4
_ADDRESS_EXTRA: Final = 4 << 30
# The interpreter's own, and what 32 threads reserve for their stacks, of which they hardly use anything. Where a cgroup
# counts what is really used: what 256 threads reserve.
_DATA_EXTRA: Final = 64 << 20
_STACKS: Final = 256 << 20
_MORE_STACKS: Final = 2 << 30

# By number: the resource module of some Pythons has no names for them.
_SIGPENDING: Final = 11
_MSGQUEUE: Final = 12
_NICE: Final = 13
_RTPRIO: Final = 14


def limits_of(*, memory: int, counted: bool, files: int, file_size: int, cpu_seconds: int | None) -> Limits:
    """The limits of a zygote and its workers. Sizes are in bytes; ``None`` sets no limit.

    ``counted`` says that a cgroup holds the worker to ``memory``. There is no limit of processes, as the kernel counts
    all of a user's.
    """
    limits = {
        resource.RLIMIT_AS: _ADDRESS_FACTOR * memory + _ADDRESS_EXTRA,
        resource.RLIMIT_DATA: memory + _DATA_EXTRA + (_MORE_STACKS if counted else _STACKS),
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
    return tuple(limits.items())


def apply(limits: Limits) -> None:
    """Set them for this process and all that follow from it. One that is tighter already stays."""
    for kind, most in limits:
        hard = resource.getrlimit(kind)[1]
        least = most if hard == resource.RLIM_INFINITY else min(most, hard)
        # At the soft limit comes SIGXCPU, by which the reason is known; at the hard one a SIGKILL like any other.
        most_hard = least + 1 if kind == resource.RLIMIT_CPU and hard != least else least
        resource.setrlimit(kind, (least, most_hard))
