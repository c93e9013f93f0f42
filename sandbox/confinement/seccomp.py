"""What system calls a child may make: filters that allow what is named here, with the arguments named here.

``zygote_filter`` is in force before the plugin is imported; a worker adds ``worker_filter``, and the stricter verdict
of the two counts. Another machine's calls kill the process. A call that is not in the tables fails with ENOSYS, so that
a libc falls back; one that is and is not allowed fails as it would without permission.

An argument that the kernel takes as an ``int`` is compared by its low half, since the caller is free to put anything in
the other one; one that it takes as a ``long`` or a pointer is compared by both.
"""

import ctypes
import errno as errors
import functools
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from . import bpf
from .bpf import ALLOW, JEQ, JSET, Branch, Node, errno, high, low
from .syscalls import AUDIT_ARCH, NUMBERS, X32_BIT

__all__ = ["OWN_PID", "Filter", "Rules", "UnsupportedMachineError", "worker_filter", "zygote_filter"]

_DENY: Final = errno(errors.EPERM)
_UNKNOWN: Final = errno(errors.ENOSYS)

OWN_PID: Final = 0x7FEDC0DE
"""Stands for the pid of the process until ``Filter`` puts it there. No process has it: pids end at 2**22."""
_PID: Final = struct.Struct("<I")
_OWN_PID: Final = _PID.pack(OWN_PID)


def _names(text: str) -> list[str]:
    return text.split()


_ALLOWED: Final = _names("""
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2 lseek sendfile copy_file_range
    close dup dup2 dup3 pipe pipe2 poll ppoll select pselect6
    epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2
    eventfd eventfd2 signalfd signalfd4 timerfd_create timerfd_settime timerfd_gettime

    open openat openat2 creat mkdir mkdirat rename renameat renameat2 link linkat symlink symlinkat unlink unlinkat
    rmdir truncate
    stat fstat lstat newfstatat statx access faccessat faccessat2 statfs fstatfs getdents getdents64 readlink readlinkat
    getcwd chdir fchdir umask ftruncate fallocate fsync fdatasync sync_file_range flock readahead fadvise64

    mmap mprotect munmap mremap brk madvise msync mincore mlock mlock2 munlock munlockall mseal membarrier get_mempolicy
    futex futex_waitv futex_wake futex_wait futex_requeue rseq set_robust_list set_tid_address

    rt_sigaction rt_sigprocmask rt_sigreturn rt_sigpending rt_sigtimedwait rt_sigsuspend sigaltstack pause
    nanosleep clock_nanosleep clock_gettime clock_getres gettimeofday time times alarm getitimer setitimer
    timer_create timer_settime timer_gettime timer_getoverrun timer_delete

    getpid getppid gettid getuid geteuid getgid getegid getresuid getresgid getgroups getpgrp getpgid getsid capget
    getrlimit setrlimit getrusage sysinfo uname getcpu getrandom
    sched_yield sched_getaffinity sched_getparam sched_getscheduler sched_getattr sched_get_priority_max
    sched_get_priority_min sched_rr_get_interval
    wait4 waitid exit exit_group restart_syscall

    recvfrom recvmsg recvmmsg shutdown getsockname getpeername
""")

# Landlock knows of no rights for these: they reach whatever a path or a read-only descriptor names.
_METADATA: Final = _names("""
    chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes futimesat utimensat
""")

# "Not supported here" is what copying programs put up with.
_XATTRS: Final = [
    f"{prefix}{verb}xattr{suffix}"
    for verb in ("get", "set", "list", "remove")
    for prefix, suffix in (("", ""), ("l", ""), ("f", ""), ("", "at"))
]

_SIGCHLD: Final = 17
_CLONE_VM: Final = 0x100
_CLONE_FS: Final = 0x200
_CLONE_FILES: Final = 0x400
_CLONE_SIGHAND: Final = 0x800
_CLONE_VFORK: Final = 0x4000
_CLONE_THREAD: Final = 0x10000
_CLONE_SYSVSEM: Final = 0x40000
_CLONE_SETTLS: Final = 0x80000
_CLONE_PARENT_SETTID: Final = 0x100000
_CLONE_CHILD_CLEARTID: Final = 0x200000
_CLONE_DETACHED: Final = 0x400000
_CLONE_CHILD_SETTID: Final = 0x1000000
_TIDS: Final = _CLONE_PARENT_SETTID | _CLONE_CHILD_CLEARTID | _CLONE_CHILD_SETTID
_FORK: Final = _SIGCHLD
_VFORK: Final = _CLONE_VM | _CLONE_VFORK | _SIGCHLD
# With the descriptors and the directory of the process: a thread that had its own would hide them from /proc.
_THREAD: Final = _CLONE_VM | _CLONE_FS | _CLONE_FILES | _CLONE_SIGHAND | _CLONE_THREAD | _CLONE_SYSVSEM
_THREAD_OPTIONAL: Final = _TIDS | _CLONE_SETTLS | _CLONE_DETACHED

_CLOSE_RANGE_UNSHARE: Final = 2
_AT_EMPTY_PATH: Final = 0x1000
_PRIO_PROCESS: Final = 0
_S_IFMT: Final = 0o170000
_MKNOD_TYPES: Final = (0, 0o100000, 0o010000)  # a file, a file, a fifo
_O_ACCMODE: Final = 3
_O_TRUNC: Final = 0o1000
_PERSONALITIES: Final = (0xFFFFFFFF, 0)  # ask, and plain Linux
_ARCH_SET_FS: Final = 0x1002
_ARCH_GET_FS: Final = 0x1003
_SECCOMP_SET_MODE_FILTER: Final = 1

_IOCTLS: Final = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS TIOCGWINSZ FIONREAD FIONBIO FIONCLEX FIOCLEX"""

_FCNTLS: Final = (*range(8), 36, 37, 38, 1030, 1031, 1032)
"""F_DUPFD to F_SETLKW, F_OFD_GETLK F_OFD_SETLK F_OFD_SETLKW, F_DUPFD_CLOEXEC F_SETPIPE_SZ F_GETPIPE_SZ. No owner,
signal, lease or notification: those are ways to have the kernel signal somebody, or to hold up who opens a file."""

_PR_SET_DUMPABLE: Final = 4
_PRCTLS: Final = (1, 2, 3, 15, 16, 21, 23, 29, 30, 36, 38, 39, 0x53564D41)
"""PR_SET_PDEATHSIG PR_GET_PDEATHSIG PR_GET_DUMPABLE PR_SET_NAME PR_GET_NAME PR_GET_SECCOMP PR_CAPBSET_READ
PR_SET_TIMERSLACK PR_GET_TIMERSLACK PR_SET_CHILD_SUBREAPER PR_SET_NO_NEW_PRIVS PR_GET_NO_NEW_PRIVS PR_SET_VMA"""

_AF_UNIX: Final = 1
_AF_INET: Final = 2
_SOCK_STREAM: Final = 1
_SOCK_FLAGS: Final = 0o2004000  # SOCK_CLOEXEC and SOCK_NONBLOCK
_TCP: Final = (0, 6)  # not MPTCP, which Landlock does not know
# Fast open connects, whatever it is given; out-of-band data on Unix sockets is of no use and has been a hole.
_MSG_REFUSED: Final = 0x20000000 | 0x1

_SOCKET_OPTIONS: Final[dict[int, tuple[int, ...]]] = {
    # REUSEADDR TYPE ERROR SNDBUF RCVBUF KEEPALIVE OOBINLINE LINGER REUSEPORT PASSCRED PEERCRED RCVLOWAT RCVTIMEO
    # SNDTIMEO ACCEPTCONN PROTOCOL DOMAIN RCVTIMEO_NEW SNDTIMEO_NEW
    1: (2, 3, 4, 7, 8, 9, 10, 13, 15, 16, 17, 18, 20, 21, 30, 38, 39, 66, 67),
    # TCP: NODELAY MAXSEG CORK KEEPIDLE KEEPINTVL KEEPCNT SYNCNT LINGER2 INFO QUICKACK USER_TIMEOUT NOTSENT_LOWAT
    6: (1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 18, 25),
    # IP: TOS TTL
    0: (1, 2),
    # IPv6: UNICAST_HOPS V6ONLY TCLASS
    41: (16, 26, 67),
}
"""Level to options. Those that can only be read are refused by the kernel to who sets them."""


class UnsupportedMachineError(Exception):
    """There is no filter for this machine."""


@dataclass(frozen=True)
class Rules:
    """What the rest of the confinement makes safe to allow."""

    subprocess: bool = False
    """The plugin may start programs. It can end them only if ``scoped_signals`` is true as well."""

    private_root: bool = False
    """All that can be seen is read-only but the plugin's own scratch: owners, modes and times change nowhere else."""

    private_processes: bool = False
    """The plugin has a process tree of its own, so that its zygote reaches nobody else's. Its workers are in it, too:
    none may signal but itself."""

    scoped_signals: bool = False
    """The kernel keeps signals from leaving each worker. With neither, a zygote may signal itself only, and as its
    filter stays in force, its workers nobody: a library's ``abort()`` still ends them."""

    truncate: bool = True
    """Landlock governs truncating. Without it only what is opened for writing can be truncated."""

    connect: bool = False
    """TCP leads nowhere but to one port of an empty network, so programs may connect to it. The worker must not be
    passed connections of another network, as it could make them lead elsewhere."""


@functools.cache  # the same for most plugins, and milliseconds to build
def zygote_filter(rules: Rules, machine: str | None = None) -> bytes:
    """The filter of a plugin zygote, which forks workers, and lets them confine themselves further."""
    everybody = rules.scoped_signals or rules.private_processes
    fork: dict[str, Node] = {
        "clone": _clone(fork=True, vfork=rules.subprocess),
        "fork": ALLOW,
        "kill": ALLOW if everybody else _is(0, OWN_PID),
        "tgkill": ALLOW if everybody else _is(0, OWN_PID),
        "setsid": ALLOW,
        "setpgid": ALLOW,
        "seccomp": _one_of(low(0), [_SECCOMP_SET_MODE_FILTER], _is(1, 0)),
        "landlock_create_ruleset": ALLOW,
        "landlock_add_rule": ALLOW,
        "landlock_restrict_self": ALLOW,
    }
    return _build(_common(rules) | fork, machine)


@functools.cache
def worker_filter(rules: Rules, machine: str | None = None) -> bytes:
    """The filter of a worker: it makes no processes but what ``rules`` allow, and no further changes to its sandbox.

    What it starts stays in its session, so that it can be ended with it.
    """
    everybody = rules.subprocess and rules.scoped_signals
    last: dict[str, Node] = {
        "clone": _clone(fork=rules.subprocess, vfork=rules.subprocess),
        "kill": ALLOW if everybody else _is(0, OWN_PID),
        "tgkill": ALLOW if everybody else _is(0, OWN_PID),
    }
    if rules.subprocess:
        last |= {"fork": ALLOW, "setpgid": ALLOW}
    return _build(_common(rules) | last, machine)


class Filter:
    """A program, ready to be put on by this process or one that is forked from it: little is left to do then."""

    def __init__(self, program: bytes) -> None:
        self._code = ctypes.create_string_buffer(program, len(program))
        self._places = [at for at in _found(program, _OWN_PID) if at % 8 == 4]  # not by chance across two instructions
        described = _Program(len(program) // 8, ctypes.addressof(self._code))
        number = NUMBERS[_supported(None)]["seccomp"]
        set_mode = ctypes.c_ulong(_SECCOMP_SET_MODE_FILTER)
        self._arguments = (ctypes.c_long(number), set_mode, ctypes.c_ulong(0), ctypes.byref(described))

    def for_process(self, pid: int) -> bytes:
        """The program for the process ``pid``, as that process itself calls it."""
        if pid <= 0:
            raise ValueError(f"{pid} is no pid")
        for at in self._places:
            _PID.pack_into(self._code, at, pid)
        return self._code.raw

    def install(self) -> None:
        """Put the calling thread, and what it will start, under it for good.

        It must have no_new_privs already. Raises ``OSError``.
        """
        self.for_process(os.getpid())
        if _libc.syscall(*self._arguments) != 0:
            failed = ctypes.get_errno()
            raise OSError(failed, os.strerror(failed))


def _found(text: bytes, part: bytes) -> Iterator[int]:
    at = text.find(part)
    while at >= 0:
        yield at
        at = text.find(part, at + 1)


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]


_libc = ctypes.CDLL(None, use_errno=True)


def _supported(machine: str | None) -> str:
    machine = machine or os.uname().machine
    if machine not in NUMBERS or sys.byteorder != "little" or sys.maxsize < 1 << 32:
        raise UnsupportedMachineError(f"there is no filter for {machine}, {sys.byteorder}-endian")
    return machine


def _common(rules: Rules) -> dict[str, Node]:
    """What zygotes and workers may do alike."""
    calls: dict[str, Node] = dict.fromkeys(_ALLOWED, ALLOW)
    calls |= dict.fromkeys(_XATTRS, errno(errors.EOPNOTSUPP))
    send = {"sendmsg": 2, "sendmmsg": 3}
    calls |= {name: _without(flags, _MSG_REFUSED) for name, flags in send.items()}
    calls |= {
        "clone3": _UNKNOWN,  # its flags are in memory, where a filter cannot look; libcs fall back to clone
        "close_range": _without(2, _CLOSE_RANGE_UNSHARE),
        "ioctl": _one_of(low(1), _IOCTLS, no=errno(errors.ENOTTY)),  # "no terminal" is what those who probe expect
        "fcntl": _one_of(low(1), _FCNTLS),
        "prctl": _one_of(low(0), _PRCTLS, no=_one_of(low(0), [_PR_SET_DUMPABLE], _zero(1))),
        "arch_prctl": _one_of(low(0), [_ARCH_SET_FS, _ARCH_GET_FS], no=errno(errors.EINVAL)),
        "personality": _one_of(low(0), _PERSONALITIES),
        "prlimit64": _is(0, 0),
        "sched_setaffinity": _one_of(low(0), [0], bpf.PRETEND),  # the front keeps who takes too much on one processor
        "getpriority": _one_of(low(0), [_PRIO_PROCESS], _is(1, 0)),
        "setpriority": _one_of(low(0), [_PRIO_PROCESS], _is(1, 0)),
        "mknod": _one_of(low(1), _MKNOD_TYPES, mask=_S_IFMT),
        "mknodat": _one_of(low(2), _MKNOD_TYPES, mask=_S_IFMT),
        "socketpair": _one_of(low(0), [_AF_UNIX], _one_of(low(1), [_SOCK_STREAM], mask=~_SOCK_FLAGS & bpf.WORD)),
        "sendto": _zero(4, _without(3, _MSG_REFUSED)),
        # The sizes of buffers are hints, and their memory is nobody's: what is there by default has to do.
        "setsockopt": _one_of(low(1), [1], _one_of(low(2), [7, 8], bpf.PRETEND, _socket_option()), _socket_option()),
        "getsockopt": _socket_option(),
    }
    if not rules.truncate:
        # Neither 0 nor 3 opens for writing, and both truncate. The flags of openat2 are in memory.
        truncating = (_O_TRUNC, _O_TRUNC | _O_ACCMODE)
        flags = {"open": 1, "openat": 2}
        calls |= {n: _one_of(low(at), truncating, _DENY, ALLOW, _O_TRUNC | _O_ACCMODE) for n, at in flags.items()}
        calls |= {"truncate": _DENY, "openat2": _UNKNOWN}
    if rules.private_root:
        calls |= dict.fromkeys(_METADATA, ALLOW)
    if rules.connect:
        kind = _one_of(low(1), [_SOCK_STREAM], _one_of(low(2), _TCP), mask=~_SOCK_FLAGS & bpf.WORD)
        calls |= {"socket": _one_of(low(0), [_AF_INET], kind), "connect": ALLOW}
    if rules.subprocess:
        # Not from a descriptor alone: that would execute what is in memory only.
        calls |= {"execve": ALLOW, "execveat": _without(4, _AT_EMPTY_PATH), "vfork": ALLOW, "pidfd_open": ALLOW}
        if rules.scoped_signals:
            calls["pidfd_send_signal"] = ALLOW
    return calls


def _one_of(offset: int, values: Iterable[int], yes: Node = ALLOW, no: Node = _DENY, mask: int = bpf.WORD) -> Node:
    """``yes`` if the word at ``offset``, masked, is one of ``values``."""
    for value in reversed(list(values)):
        no = Branch(offset, JEQ, value, yes, no, mask)
    return no


def _is(argument: int, value: int) -> Node:
    return _one_of(low(argument), [value])


def _zero(argument: int, yes: Node = ALLOW) -> Node:
    """``yes`` if all 64 bits of an argument are 0."""
    return _one_of(low(argument), [0], _one_of(high(argument), [0], yes))


def _without(argument: int, bits: int, yes: Node = ALLOW) -> Node:
    """``yes`` if the argument, an ``int``, has none of ``bits``."""
    return Branch(low(argument), JSET, bits, _DENY, yes)


def _clone(fork: bool, vfork: bool) -> Node:
    """Threads, and the processes that are asked for: no namespaces, no odd parents, no signals but SIGCHLD."""
    kinds = [_FORK] * fork + [_VFORK] * vfork
    process = _one_of(low(0), kinds, mask=~_TIDS & bpf.WORD)
    flags = _one_of(low(0), [_THREAD], no=process, mask=~_THREAD_OPTIONAL & bpf.WORD)
    return _one_of(high(0), [0], flags)  # they are a long; the kernel looks at the low half today


def _socket_option() -> Node:
    node: Node = errno(errors.ENOPROTOOPT)
    refused = node
    for level, options in _SOCKET_OPTIONS.items():
        node = _one_of(low(1), [level], _one_of(low(2), options, no=refused), node)
    return node


def _build(calls: dict[str, Node], machine: str | None) -> bytes:
    machine = _supported(machine)
    by_number = {number: calls.get(name, _DENY) for name, number in NUMBERS[machine].items()}
    ranges: list[tuple[int, Node]] = [(0, by_number.get(0, _UNKNOWN))]
    for number in range(1, max(by_number) + 2):
        verdict = by_number.get(number, _UNKNOWN)
        if verdict != ranges[-1][1]:
            ranges.append((number, verdict))
    if machine == "x86_64":
        ranges.append((X32_BIT, bpf.KILL))
    search = bpf.choose(bpf.NR, ranges)
    return bpf.assemble(Branch(bpf.ARCH, JEQ, AUDIT_ARCH[machine], search, bpf.KILL))
