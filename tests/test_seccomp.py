"""Seccomp filters, interpreted for both machines and compared with what libseccomp makes."""

import dataclasses
import errno
import fcntl
import itertools
import os
import socket
import tempfile
import termios
from collections.abc import Callable
from typing import Any, Final

import pytest

from sandbox.confinement import bpf, seccomp
from sandbox.confinement.seccomp import OWN_PID, Filter, Rules, worker_filter, zygote_filter
from sandbox.confinement.syscalls import AUDIT_ARCH, NUMBERS, X32_BIT

from .bpf import Data, InvalidProgramError, decode, explore, run

_Build = Callable[..., bytes]
_FILTERS: Final[tuple[_Build, ...]] = (zygote_filter, worker_filter)
_ALL: Final = Rules(subprocess=True, private_root=True, scoped_signals=True)
_RULES: Final = [
    *(Rules(*flags) for flags in itertools.product((False, True), repeat=5)),
    *(dataclasses.replace(rules, connect=True) for rules in (Rules(), _ALL)),
]
_ALLOW: Final = "allow"
_GARBAGE: Final = 0xDEADBEEF << 32
_POINTER: Final = 0x7FFF_0000_1000
_PID: Final = 4242
_MACHINES: Final = sorted(NUMBERS)

machines = pytest.mark.parametrize("machine", _MACHINES)
roles = pytest.mark.parametrize("build", _FILTERS, ids=["zygote", "worker"])


def _said(verdict: int) -> str:
    if verdict == bpf.ALLOW:
        return _ALLOW
    if verdict == bpf.KILL:
        return "kill"
    return "pretended" if verdict == bpf.PRETEND else errno.errorcode[verdict & 0xFFFF]


def _verdict(program: bytes, machine: str, call: int | str, *args: int) -> str:
    number = NUMBERS[machine][call] if isinstance(call, str) else call
    padded = (*args, *[0] * (6 - len(args)))
    return _said(run(program, Data(number, AUDIT_ARCH[machine], padded)).verdict)  # type: ignore[arg-type]


# ---- assembler and interpreter


@machines
@roles
@pytest.mark.parametrize("rules", _RULES, ids=str)
def test_every_instruction_is_reached_and_every_jump_goes_both_ways(rules: Rules, build: _Build, machine: str) -> None:
    program = build(rules, machine)
    code = decode(program)
    reached: set[int] = set()
    ways: set[tuple[int, bool]] = set()
    for _, trace in explore(program, Data(0, AUDIT_ARCH[machine])):
        reached.update(trace.reached)
        ways.update((jump.at, jump.taken) for jump in trace.jumps)
        assert trace.verdict in (bpf.ALLOW, bpf.KILL) or _said(trace.verdict)
    assert reached == set(range(len(code)))
    conditional = {at for at, (operation, *_) in enumerate(code) if operation in (bpf.JEQ, bpf.JGE, bpf.JSET)}
    assert ways == set(itertools.product(conditional, (False, True)))
    assert len(code) < 350


def test_far_branches_are_reached() -> None:
    one = bpf.choose(bpf.low(0), [(value, 10_000 + value) for value in range(600)])
    other = bpf.choose(bpf.high(5), [(value, 20_000 + value) for value in range(600)])
    shared = bpf.choose(bpf.NR, [(0, one), (5, other), (10, one), (15, 1)])
    program = bpf.assemble(bpf.Branch(bpf.low(1), bpf.JSET, 6, shared, bpf.Branch(bpf.NR, bpf.JEQ, 2, one, 3), 0xF))
    for value in range(600):
        for number, expected in ((4, 10_000 + value), (5, 20_000 + value), (10, 10_000 + value), (15, 1)):
            assert run(program, Data(number, 0, (value, 0x4F4, 0, 0, 0, value << 32))).verdict == expected
        assert run(program, Data(2, 0, (value, 0x40, 0, 0, 0, 0))).verdict == 10_000 + value
    assert run(program, Data(3, 0, (0, 0xFFF9, 0, 0, 0, 0))).verdict == 3
    assert len(program) // 8 < 600 * 4 + 100, "what is shared is there once"


def test_a_program_that_is_too_long_is_refused() -> None:
    assert bpf.assemble(bpf.choose(bpf.NR, [(value, value) for value in range(2000)]))
    with pytest.raises(bpf.ProgramTooLongError):
        bpf.assemble(bpf.choose(bpf.NR, [(value, value) for value in range(2100)]))


@pytest.mark.parametrize("number", [0, -1, 4096])
def test_what_is_no_errno_is_refused(number: int) -> None:
    with pytest.raises(ValueError, match="no errno"):
        bpf.errno(number)


@pytest.mark.parametrize("program", [b"", b"\x06", bpf.assemble(1)[:-8] + b"\x20" + bytes(7), b"\x05" + bytes(7)])
def test_the_interpreter_refuses_what_the_kernel_refuses(program: bytes) -> None:
    with pytest.raises(InvalidProgramError):
        run(program, Data(0, 0))


@pytest.mark.parametrize("machine", ["i686", "armv7l", "aarch64_be", "s390x", "riscv64"])
def test_other_machines_have_no_filter(machine: str) -> None:
    with pytest.raises(seccomp.UnsupportedMachineError, match=machine):
        worker_filter(Rules(), machine)


def test_the_pid_is_put_where_it_belongs_and_nowhere_else() -> None:
    program = worker_filter(Rules())
    patched = Filter(program).for_process(_PID)
    changed = [(a, b) for a, b in zip(decode(program), decode(patched), strict=True) if a != b]
    assert changed
    assert all(a == (bpf.JEQ, *a[1:3], OWN_PID) and b == (*a[:3], _PID) for a, b in changed)
    assert OWN_PID > 1 << 22
    for pid in (0, -1):
        with pytest.raises(ValueError, match="no pid"):
            Filter(program).for_process(pid)


# ---- decisions


@machines
@roles
def test_foreign_calls_kill_and_unknown_ones_do_not_exist(build: _Build, machine: str) -> None:
    program = build(_ALL, machine)
    for arch in (
        0,
        0x40000003,
        0x40000028,
        AUDIT_ARCH["x86_64"] ^ 0x80000000,
        AUDIT_ARCH[_MACHINES[machine == "aarch64"]],
    ):
        if arch != AUDIT_ARCH[machine]:
            assert _said(run(program, Data(NUMBERS[machine]["read"], arch)).verdict) == "kill"
    known = set(NUMBERS[machine].values())
    for number in [n for n in range(1200) if n not in known] + [X32_BIT - 1]:
        assert _verdict(program, machine, number) == "ENOSYS"
    for number in (X32_BIT, X32_BIT | NUMBERS[machine]["read"], 0xFFFFFFFF):
        assert _verdict(program, machine, number) == ("kill" if machine == "x86_64" else "ENOSYS")


_NEVER: Final = """
    ptrace process_vm_readv process_vm_writev process_madvise process_mrelease pidfd_getfd kcmp get_robust_list
    io_uring_setup io_uring_enter io_uring_register io_setup io_submit io_getevents io_pgetevents io_cancel io_destroy
    bpf perf_event_open userfaultfd memfd_create memfd_secret keyctl add_key request_key lookup_dcookie
    unshare setns mount umount2 pivot_root chroot fsopen fsconfig fsmount fspick move_mount open_tree open_tree_attr
    mount_setattr statmount listmount name_to_handle_at open_by_handle_at quotactl quotactl_fd swapon swapoff acct
    bind listen accept accept4 splice tee vmsplice sync syncfs
    inotify_init1 inotify_add_watch inotify_rm_watch fanotify_init fanotify_mark cachestat file_getattr file_setattr
    tkill rt_sigqueueinfo rt_tgsigqueueinfo ioprio_set ioprio_get sched_setscheduler sched_setparam sched_setattr
    setuid setgid setreuid setregid setresuid setresgid setfsuid setfsgid setgroups capset personality
    init_module finit_module delete_module kexec_load kexec_file_load reboot syslog vhangup sethostname setdomainname
    settimeofday clock_settime clock_adjtime adjtimex mlockall remap_file_pages mbind set_mempolicy migrate_pages
    set_mempolicy_home_node move_pages pkey_alloc pkey_free pkey_mprotect map_shadow_stack nfsservctl
    shmget shmat shmctl shmdt semget semop semctl semtimedop msgget msgsnd msgrcv msgctl
    mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr
    lsm_get_self_attr lsm_set_self_attr lsm_list_modules
"""
_NEVER_X86: Final = """
    modify_ldt iopl ioperm create_module get_kernel_syms query_module uselib ustat sysfs _sysctl inotify_init
    set_thread_area get_thread_area epoll_ctl_old epoll_wait_old uretprobe uprobe
"""


@machines
@roles
@pytest.mark.parametrize("rules", _RULES, ids=str)
def test_what_nobody_may_do(rules: Rules, build: _Build, machine: str) -> None:
    program = build(rules, machine)
    for name in (_NEVER + (_NEVER_X86 if machine == "x86_64" else "")).split():
        for arg in (1, _GARBAGE | 1, 0x7FFFFFFF):
            assert _verdict(program, machine, name, *[arg] * 6) == "EPERM", name
    for name in NUMBERS[machine]:
        if "xattr" in name:
            assert _verdict(program, machine, name) == "ENOTSUP", name
    assert _verdict(program, machine, "clone3", _POINTER, 88) == "ENOSYS"


_THREAD: Final = 0x3D0F00
_NAMESPACES: Final = (0x80, 0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)
_FORK: Final = 0x1200011
_VFORK: Final = 0x4111
# call, args, what it takes for both, for the zygote only; "" means never
_SIGNALS: Final = "scoped and subprocess or zygote and (scoped or tree)"
_CASES: Final[list[tuple[str, tuple[int, ...], str]]] = [
    ("clone", (_THREAD,), "always"),
    ("clone", (_THREAD | 0x400000,), "always"),
    ("clone", (_THREAD | _GARBAGE,), ""),
    ("clone", (_THREAD & ~0x10000,), ""),
    ("clone", (_THREAD & ~0x400,), ""),
    ("clone", (_THREAD | 17,), ""),
    ("clone", (_FORK,), "zygote or subprocess"),
    ("clone", (17,), "zygote or subprocess"),
    ("clone", (9,), ""),
    ("clone", (0,), ""),
    ("clone", (_VFORK,), "subprocess"),
    ("clone", (0x111,), ""),
    *[("clone", (base | flag,), "") for base in (_FORK, _VFORK, _THREAD) for flag in _NAMESPACES],
    *[("clone", (_FORK | flag,), "") for flag in (0x1000, 0x2000, 0x8000, 0x800000, 0x80000000, 1 << 33, 1 << 32)],
    ("execve", (_POINTER, _POINTER, _POINTER), "subprocess"),
    ("execveat", (3, _POINTER, 0, 0, 0), "subprocess"),
    ("execveat", (3, _POINTER, 0, 0, 0x1000), ""),
    ("execveat", (3, _POINTER, 0, 0, _GARBAGE | 0x1100), ""),
    ("kill", (_PID, 9), "always"),
    ("kill", (_PID | _GARBAGE, 9), "always"),
    *[("kill", (pid & (1 << 64) - 1, 9), _SIGNALS) for pid in (0, -1, 1, -_PID, _PID + 1)],
    ("tgkill", (_PID, _PID + 1, 9), "always"),
    ("tgkill", (_PID + 1, _PID + 1, 9), _SIGNALS),
    ("pidfd_open", (1, 0), "subprocess"),
    ("pidfd_send_signal", (3, 9, 0, 0), "subprocess and scoped"),
    ("setsid", (), "zygote"),
    ("setpgid", (0, 0), "zygote or subprocess"),
    ("seccomp", (1, 0, _POINTER), "zygote"),
    *[("seccomp", (1, flags, _POINTER), "") for flags in (1, 2, 4, 8, 16, 32, _GARBAGE | 8)],
    *[("seccomp", (operation, 0, _POINTER), "") for operation in (0, 2, 3)],
    ("landlock_create_ruleset", (_POINTER, 8, 0), "zygote"),
    ("landlock_add_rule", (3, 1, _POINTER, 0), "zygote"),
    ("landlock_restrict_self", (3, 0), "zygote"),
    *[("prctl", (o, _POINTER), "always") for o in (1, 2, 3, 15, 16, 21, 23, 29, 30, 36, 38, 39, 0x53564D41)],
    ("prctl", (_GARBAGE | 38, 1), "always"),
    ("prctl", (4, 0), "always"),
    *[("prctl", (4, value), "") for value in (1, 2, 1 << 32)],
    *[
        ("prctl", (o, 0), "")
        for o in (8, 14, 22, 24, 28, 31, 35, 41, 47, 52, 53, 59, 62, 65, 0x59616D61, _GARBAGE | 22)
    ],
    *[("fcntl", (3, c), "always") for c in (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032, _GARBAGE | 4)],
    *[("fcntl", (3, c), "") for c in (8, 9, 10, 11, 15, 16, 17, 1024, 1025, 1026, 1033, 1034, 1035, 1036, 1040)],
    ("fcntl", (3, _GARBAGE | 8), ""),
    *[("ioctl", (0, c), "always") for c in (0x541B, 0x5421, 0x5451, 0x5450, 0x5401, 0x5413, _GARBAGE | 0x541B)],
    ("socketpair", (1, 1), "always"),
    ("socketpair", (1, 1 | 0o2004000), "always"),
    ("socketpair", (1 | _GARBAGE, 1 | _GARBAGE), "always"),
    *[("socketpair", (1, kind), "") for kind in (0, 2, 3, 5, 2 | 0o2000000, _GARBAGE | 2)],
    *[("socketpair", (family, 1), "") for family in (0, 2, 10, 16, 17, 30, 38, 40)],
    ("connect", (3, _POINTER, 16), "connect"),
    *[("socket", (2, kind, protocol), "connect") for kind in (1, 1 | 0o2004000, _GARBAGE | 1) for protocol in (0, 6)],
    ("socket", (_GARBAGE | 2, 1, _GARBAGE | 6), "connect"),
    *[("socket", (family, kind, 0), "") for family in (0, 1, 10, 16, 17, 38, 40, 44) for kind in (1, 2, 3, 5)],
    *[("socket", (2, kind, 0), "") for kind in (0, 2, 3, 4, 5, 6, 10, 2 | 0o2000000, 1 | 16)],
    *[("socket", (2, 1, protocol), "") for protocol in (1, 17, 33, 132, 136, 256, 262)],
    ("sendto", (3, _POINTER, 5, 0x4000, 0, 0), "always"),
    ("sendto", (3, _POINTER, 5, 0, 1, 16), ""),
    ("sendto", (3, _POINTER, 5, 0, 1 << 32, 16), ""),
    ("sendto", (3, _POINTER, 5, 0x20000000, 0, 0), ""),
    ("sendto", (3, _POINTER, 5, _GARBAGE | 1, 0, 0), ""),
    ("sendmsg", (3, _POINTER, 0x4000), "always"),
    ("sendmsg", (3, _POINTER, 0x20004000), ""),
    ("sendmsg", (3, _POINTER, 1), ""),
    ("sendmmsg", (3, _POINTER, 1, 0), "always"),
    ("sendmmsg", (3, _POINTER, 1, 0x20000000), ""),
    ("close_range", (3, 5, 0), "always"),
    ("close_range", (3, 5, 4), "always"),
    ("close_range", (3, 5, 2), ""),
    ("close_range", (3, 5, _GARBAGE | 6), ""),
    ("prlimit64", (0, 7, 0, _POINTER), "always"),
    ("prlimit64", (_GARBAGE, 7, 0, _POINTER), "always"),
    ("prlimit64", (1, 7, 0, _POINTER), ""),
    ("sched_setaffinity", (1, 8, _POINTER), ""),
    ("sched_getaffinity", (1, 8, _POINTER), "always"),
    *[(name, (0, 0, 5), "always") for name in ("getpriority", "setpriority")],
    *[(name, args, "") for name in ("getpriority", "setpriority") for args in ((0, 1), (1, 0), (2, 0), (2, _GARBAGE))],
    ("personality", (0xFFFFFFFF,), "always"),
    ("personality", (0,), "always"),
    *[("personality", (kind,), "") for kind in (8, 0x40000, 0x400000, 0xFFFFFFFE)],
    *[("mknodat", (3, _POINTER, mode, 0), "always") for mode in (0o600, 0o100600, 0o010600, 1 << 16)],
    *[
        ("mknodat", (3, _POINTER, mode, 259), "")
        for mode in (0o020600, 0o060600, 0o140600, 0o040700, 0o120000, 0o170000)
    ],
    ("fchmod", (3, 0o600), "private"),
    ("fchmodat2", (3, _POINTER, 0o600, 0), "private"),
    ("fchownat", (3, _POINTER, 0, 0, 0), "private"),
    ("utimensat", (3, _POINTER, 0, 0), "private"),
    ("truncate", (_POINTER, 0), "truncate"),
    ("openat2", (3, _POINTER, _POINTER, 24), "truncate"),
    ("ftruncate", (3, 0), "always"),
    *[("openat", (3, _POINTER, flags), "truncate") for flags in (0o1000, 0o1003, 0o2001000, _GARBAGE | 0o1000)],
    *[("openat", (3, _POINTER, flags), "always") for flags in (0, 0o1001, 0o1002, 0o1102, 3)],
]
_X86_CASES: Final[list[tuple[str, tuple[int, ...], str]]] = [
    ("fork", (), "zygote or subprocess"),
    ("vfork", (), "subprocess"),
    ("arch_prctl", (0x1002, _POINTER), "always"),
    *[("arch_prctl", (option, 0), "") for option in (0x1001, 0x1012, 0x2003, 0x3001, 0x4002, 0x5001)],
    *[("mknod", (_POINTER, mode, 0), "always") for mode in (0o600, 0o100600, 0o010600)],
    ("mknod", (_POINTER, 0o020600, 259), ""),
    *[("open", (_POINTER, flags), "truncate") for flags in (0o1000, 0o1003)],
    ("open", (_POINTER, 0o1102), "always"),
    *[(name, (_POINTER, 0, 0), "private") for name in ("chmod", "chown", "lchown", "utime", "utimes", "futimesat")],
]


@machines
@roles
@pytest.mark.parametrize("rules", _RULES, ids=str)
def test_decisions_about_arguments(rules: Rules, build: _Build, machine: str) -> None:
    program = Filter(build(rules, machine)).for_process(_PID)
    facts = {
        "always": True,
        "zygote": build is zygote_filter,
        "subprocess": rules.subprocess,
        "private": rules.private_root,
        "scoped": rules.scoped_signals,
        "tree": rules.private_processes,
        "truncate": rules.truncate,
        "connect": rules.connect,
    }
    for name, args, needs in _CASES + (_X86_CASES if machine == "x86_64" else []):
        allowed = bool(needs) and eval(needs, {}, facts)  # noqa: S307  # of the literals above
        verdict = _verdict(program, machine, name, *args)
        assert (verdict == _ALLOW) is allowed, (name, args, verdict)
        refusal = {"arch_prctl": "EINVAL", "openat2": "ENOSYS"}.get(name, "EPERM")
        assert verdict in (_ALLOW, refusal), (name, args, verdict)


@machines
@roles
def test_who_chooses_its_processors_is_told_that_it_has(build: _Build, machine: str) -> None:
    assert _verdict(build(_ALL, machine), machine, "sched_setaffinity", 0, 8, _POINTER) == "pretended"


@machines
@roles
def test_terminals_are_none_and_unknown_options_are_not_there(build: _Build, machine: str) -> None:
    program = build(_ALL, machine)
    for request in (
        termios.TIOCSTI,
        0x541C,
        0x5411,
        0x5452,
        0x8901,
        0x8912,
        0x4B33,
        _GARBAGE | termios.TIOCSTI,
        0x40049409,
    ):
        assert _verdict(program, machine, "ioctl", 0, request) == "ENOTTY"
    for call in ("setsockopt", "getsockopt"):
        for level, options in _OPTIONS.items():
            for option in range(80):
                expected = _ALLOW if option in options else "ENOPROTOOPT"
                if call == "setsockopt" and level == socket.SOL_SOCKET and option in _BUFFERS:
                    expected = "pretended"
                assert _verdict(program, machine, call, 3, _GARBAGE | level, _GARBAGE | option) == expected
        for level in (17, 132, 255, 263, 270, 279, 282, 284):
            assert _verdict(program, machine, call, 3, level, 1) == "ENOPROTOOPT"


_BUFFERS: Final = (socket.SO_SNDBUF, socket.SO_RCVBUF)
_OPTIONS: Final[dict[int, set[int]]] = {
    socket.SOL_SOCKET: {2, 3, 4, 7, 8, 9, 10, 13, 15, 16, 17, 18, 20, 21, 30, 38, 39, 66, 67},
    socket.IPPROTO_TCP: {1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 18, 25},
    socket.IPPROTO_IP: {socket.IP_TOS, socket.IP_TTL},
    socket.IPPROTO_IPV6: {socket.IPV6_UNICAST_HOPS, socket.IPV6_V6ONLY, socket.IPV6_TCLASS},
}


# ---- libseccomp as the oracle


def _oracle(machine: str) -> Any:
    """A worker's filter without any permission, said in libseccomp's words."""
    lib = pytest.importorskip("pyseccomp", reason="pyseccomp (with libseccomp2) is not installed: NO ORACLE")
    arch = {"x86_64": lib.Arch.X86_64, "aarch64": lib.Arch.AARCH64}[machine]
    oracle = lib.SyscallFilter(lib.ERRNO(1))
    if arch != lib.system_arch():
        oracle.add_arch(arch)
        oracle.remove_arch(lib.system_arch())

    def allow(name: str, *args: tuple[int, int, int]) -> None:
        if name in NUMBERS[machine] and lib.resolve_syscall(arch, name) >= 0:
            oracle.add_rule(lib.ALLOW, name, *[lib.Arg(at, lib.MASKED_EQ, mask, value) for at, mask, value in args])

    word, both = 0xFFFFFFFF, (1 << 64) - 1
    for name in seccomp._ALLOWED:
        allow(name)
    t = termios
    for request in (t.TCGETS, t.TIOCGWINSZ, t.FIONREAD, t.FIONBIO, t.FIONCLEX, t.FIOCLEX):
        allow("ioctl", (1, word, request))
    f = fcntl
    for command in (f.F_DUPFD, f.F_GETFD, f.F_SETFD, f.F_GETFL, f.F_SETFL, f.F_GETLK, f.F_SETLK, f.F_SETLKW):
        allow("fcntl", (1, word, command))
    for command in (f.F_OFD_GETLK, f.F_OFD_SETLK, f.F_OFD_SETLKW, f.F_DUPFD_CLOEXEC, f.F_SETPIPE_SZ, f.F_GETPIPE_SZ):
        allow("fcntl", (1, word, command))
    for option in (1, 2, 3, 15, 16, 21, 23, 29, 30, 36, 38, 39, 0x53564D41):
        allow("prctl", (0, word, option))
    allow("prctl", (0, word, 4), (1, both, 0))
    for name, options in (("arch_prctl", (0x1002, 0x1003)), ("personality", (0, word)), ("kill", (OWN_PID,))):
        for option in options:
            allow(name, (0, word, option))
    allow("tgkill", (0, word, OWN_PID))
    allow("prlimit64", (0, word, 0))
    allow("getpriority", (0, word, os.PRIO_PROCESS), (1, word, 0))
    allow("setpriority", (0, word, os.PRIO_PROCESS), (1, word, 0))
    for kind in (0, 0o100000, 0o010000):
        allow("mknod", (1, 0o170000, kind))
        allow("mknodat", (2, 0o170000, kind))
    kind = word & ~(socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    allow("socketpair", (0, word, socket.AF_UNIX), (1, kind, socket.SOCK_STREAM))
    allow("sendto", (4, both, 0), (3, socket.MSG_FASTOPEN | socket.MSG_OOB, 0))
    allow("sendmsg", (2, socket.MSG_FASTOPEN | socket.MSG_OOB, 0))
    allow("sendmmsg", (3, socket.MSG_FASTOPEN | socket.MSG_OOB, 0))
    allow("close_range", (2, 2, 0))
    allow("clone", (0, both & ~0x1780000, 0x50F00))
    for level, options_of_level in _OPTIONS.items():
        for option in options_of_level:
            if level != socket.SOL_SOCKET or option not in _BUFFERS:
                allow("setsockopt", (1, word, level), (2, word, option))
            allow("getsockopt", (1, word, level), (2, word, option))
    with tempfile.TemporaryFile() as file:
        oracle.export_bpf(file)
        file.seek(0)
        return lib, arch, file.read()


@machines
def test_libseccomp_has_the_same_numbers_and_decides_alike(machine: str) -> None:
    lib, arch, theirs = _oracle(machine)
    known = {name: lib.resolve_syscall(arch, name) for name in NUMBERS[machine]}
    assert {n: at for n, at in known.items() if at >= 0} == {
        n: NUMBERS[machine][n] for n, at in known.items() if at >= 0
    }
    new = {NUMBERS[machine][name] for name, at in known.items() if at < 0}
    assert min(new, default=451) > 443 or machine == "x86_64"
    ours = worker_filter(Rules(), machine)
    inputs = [Data(number, AUDIT_ARCH[machine]) for number in range(1200)]
    inputs += [data for program in (ours, theirs) for data, _ in explore(program, inputs[0])]
    us, them = decode(ours), decode(theirs)
    for data in inputs:
        if data.number not in new:
            assert (run(us, data).verdict == bpf.ALLOW) is (run(them, data).verdict == bpf.ALLOW), data
