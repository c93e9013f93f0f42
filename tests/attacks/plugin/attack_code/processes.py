"""Processes: peeking at others, signalling them, changing what they may, and having some that nobody knows of."""

import ctypes
import fcntl
import mmap
import os
import resource
import signal
import socket
import struct
import subprocess
import time
from pathlib import Path

from .harness import Refused, Victims, attack, call, libc

_P_USR1 = int(signal.SIGUSR1)
_CLONE_VM, _CLONE_PARENT, _CLONE_NEWUSER, _CLONE_UNTRACED = 0x100, 0x8000, 0x10000000, 0x800000
_F_SETSIG, _F_SETOWN_EX = 10, 15


def _vector(address: int, size: int) -> bytes:
    return struct.pack("PN", address, size)


def read_memory(pid: int, address: int, size: int) -> str:
    buffer = ctypes.create_string_buffer(size)
    call("process_vm_readv", pid, _vector(ctypes.addressof(buffer), size), 1, _vector(address, size), 1, 0)
    return buffer.raw.decode(errors="replace")


def write_memory(pid: int, address: int, data: bytes) -> int:
    buffer = ctypes.create_string_buffer(data)
    return call(
        "process_vm_writev", pid, _vector(ctypes.addressof(buffer), len(data)), 1, _vector(address, len(data)), 1, 0
    )


# ---- peeking


@attack("Reads the memory of another process", harm="loot")
def memory_read(v: Victims) -> str:
    return read_memory(v.pid, v.address, v.length)


@attack("Writes to the memory of another process", harm="memory")
def memory_write(v: Victims) -> str:
    return str(write_memory(v.pid, v.cell, b"attacked"))


@attack("Reads the memory of another process through /proc/PID/mem", harm="loot")
def memory_read_proc(v: Victims) -> str:
    with open(f"/proc/{v.pid}/mem", "rb", buffering=0) as file:
        file.seek(v.address)
        return file.read(v.length).decode()


@attack("Writes to the memory of another process through /proc/PID/mem", harm="memory")
def memory_write_proc(v: Victims) -> str:
    with open(f"/proc/{v.pid}/mem", "r+b", buffering=0) as file:
        file.seek(v.cell)
        return str(file.write(b"attacked"))


@attack("Attaches to another process as its debugger and reads its memory", harm="loot")
def debug_attach(v: Victims) -> str:
    call("ptrace", 16, v.pid, 0, 0)  # PTRACE_ATTACH
    try:
        os.waitpid(v.pid, 0x40000000)
        found = b""
        for offset in range(0, v.length, 8):
            word = ctypes.c_long()
            call("ptrace", 1, v.pid, v.address + offset, ctypes.byref(word))  # PTRACE_PEEKTEXT
            found += struct.pack("l", word.value)
        return found.decode(errors="replace")
    finally:
        call("ptrace", 17, v.pid, 0, 0)  # PTRACE_DETACH


@attack("Attaches to another process as its debugger without stopping it")
def debug_seize(v: Victims) -> str:
    call("ptrace", 0x4206, v.pid, 0, 0)
    call("ptrace", 0x4207, v.pid, 0, 0)  # it must stop before it can be let go
    os.waitpid(v.pid, 0x40000000)
    return str(call("ptrace", 17, v.pid, 0, 0))


@attack("Asks to be debugged by its parent")
def debug_me(v: Victims) -> str:
    return str(call("ptrace", 0, 0, 0, 0))


@attack("Takes a descriptor from another process and reads what it leads to", harm="loot")
def descriptor_steal(v: Victims) -> str:
    other = call("pidfd_open", v.pid, 0)
    return os.pread(call("pidfd_getfd", other, v.fd, 0), 1000, 0).decode()


@attack("Reads the environment of another process", harm="loot")
def environment_read(v: Victims) -> str:
    return Path(f"/proc/{v.pid}/environ").read_text()


@attack("Lists the processes of the machine with their arguments", harm="loot")
def processes_list(v: Victims) -> str:
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found.append(Path("/proc", name, "cmdline").read_text())
            except OSError:
                pass
    return " ".join(text for text in found if "victim" in text)


@attack("Reads where another process has its memory")
def mappings_read(v: Victims) -> str:
    if not (found := Path(f"/proc/{v.pid}/maps").read_text()):
        raise Refused("empty")
    return found[:100]


@attack("Compares its own resources with those of another process")
def resources_compare(v: Victims) -> str:
    return str(call("kcmp", os.getpid(), v.pid, 1, 0, 0))


@attack("Asks for the list of locks of another process, which is an address in it")
def robust_list_read(v: Victims) -> str:
    address, size = ctypes.c_void_p(), ctypes.c_size_t()
    call("get_robust_list", v.pid, ctypes.byref(address), ctypes.byref(size))
    return str(address.value)


@attack("Asks on which memory node the pages of another process are")
def pages_of_another(v: Victims) -> str:
    page = ctypes.c_void_p(v.address & ~4095)
    status = ctypes.c_int()
    return str(call("move_pages", v.pid, 1, ctypes.byref(page), 0, ctypes.byref(status), 0))


@attack("Moves the pages of another process")
def pages_move(v: Victims) -> str:
    mask = ctypes.c_ulong(1)
    return str(call("migrate_pages", v.pid, 2, ctypes.byref(mask), ctypes.byref(mask)))


@attack("Advises the kernel to push the memory of another process out", root=True)
def advise_another(v: Victims) -> str:
    other = call("pidfd_open", v.pid, 0)
    return str(call("process_madvise", other, _vector(v.address & ~4095, 4096), 1, 20, 0))


@attack("Counts what another process does with performance events")
def events_of_another(v: Victims) -> str:
    event = bytearray(128)
    struct.pack_into("IIQ", event, 0, 1, 128, 1)  # software, task clock
    struct.pack_into("Q", event, 40, 1 << 5 | 1 << 6)  # not in the kernel
    return str(call("perf_event_open", bytes(event), v.pid, -1, -1, 0))


@attack("Holds on to another process to hear of its end")
def pidfd_of_another(v: Victims) -> str:
    return str(os.pidfd_open(v.pid))


@attack("Finds out whether a process exists, and its group and session")
def group_of_another(v: Victims) -> str:
    return f"{os.getpgid(v.pid)} {os.getsid(v.pid)}"


@attack("Finds out how another process is scheduled")
def schedule_of_another(v: Victims) -> str:
    return f"{os.sched_getscheduler(v.pid)} {os.sched_getaffinity(v.pid)} {os.getpriority(os.PRIO_PROCESS, v.pid)}"


# ---- signalling


@attack("Signals another process with kill", harm="signal")
def signal_kill(v: Victims) -> str:
    os.kill(v.pid, signal.SIGUSR1)
    return "done"


@attack("Signals the group of another process", harm="signal")
def signal_group(v: Victims) -> str:
    os.kill(-v.pid, signal.SIGUSR1)
    return "done"


@attack("Signals another process with tkill", harm="signal")
def signal_tkill(v: Victims) -> str:
    return str(call("tkill", v.pid, _P_USR1))


@attack("Signals another process with tgkill", harm="signal")
def signal_tgkill(v: Victims) -> str:
    return str(call("tgkill", v.pid, v.pid, _P_USR1))


def _info() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(struct.pack("iiiiii", _P_USR1, 0, -1, 0, os.getpid(), os.getuid()) + bytes(104))


@attack("Signals another process with rt_sigqueueinfo", harm="signal")
def signal_queue(v: Victims) -> str:
    return str(call("rt_sigqueueinfo", v.pid, _P_USR1, _info()))


@attack("Signals a thread of another process with rt_tgsigqueueinfo", harm="signal")
def signal_queue_thread(v: Victims) -> str:
    return str(call("rt_tgsigqueueinfo", v.pid, v.pid, _P_USR1, _info()))


@attack("Signals another process through a pidfd", harm="signal")
def signal_pidfd(v: Victims) -> str:
    return str(call("pidfd_send_signal", call("pidfd_open", v.pid, 0), _P_USR1, None, 0))


def _ready(owner: int, *, thread: bool = False) -> None:
    """Have the kernel signal ``owner`` as data arrives on a socket."""
    one, other = socket.socketpair()
    fcntl.fcntl(one, _F_SETSIG, _P_USR1)
    if thread:
        fcntl.fcntl(one, _F_SETOWN_EX, struct.pack("ii", 0, owner))
    else:
        fcntl.fcntl(one, fcntl.F_SETOWN, owner)
    fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    other.send(b"x")


@attack("Has the kernel signal another process when a socket is ready", harm="signal")
def signal_owner(v: Victims) -> str:
    _ready(v.pid)
    return "done"


@attack("Has the kernel signal a thread of another process when a socket is ready", harm="signal")
def signal_owner_thread(v: Victims) -> str:
    _ready(v.pid, thread=True)
    return "done"


@attack("Has the kernel signal another process's group with the older ioctl", harm="signal")
def signal_owner_ioctl(v: Victims) -> str:
    one, other = socket.socketpair()
    fcntl.ioctl(one, 0x8901, struct.pack("i", -v.pid))  # FIOSETOWN
    fcntl.fcntl(one, _F_SETSIG, _P_USR1)
    fcntl.ioctl(one, 0x5452, struct.pack("i", 1))  # FIOASYNC
    return str(other.send(b"x"))


@attack("Has a timer signal a thread of another process", harm="signal", root=False)
def signal_timer(v: Victims) -> str:
    event = struct.pack("PiiI", 0, _P_USR1, 4, v.pid) + bytes(48)
    return str(call("timer_create", 1, event, ctypes.byref(ctypes.c_int())))


@attack("Signals the host")
def signal_host(v: Victims) -> str:
    os.kill(v.host_pid, signal.SIGURG)
    return "done"


@attack("Finds the worker of another org by trying process ids")
def processes_guess(v: Victims) -> str:
    for pid in (v.peer_pid, v.host_pid, v.pid):
        try:
            os.kill(pid, 0)
            return f"{pid} is there"
        except OSError:
            pass
    raise Refused("none is there")


@attack("Ends its zygote, which other orgs' workers come from", harm="zygote")
def signal_zygote(v: Victims) -> str:
    if (parent := os.getppid()) <= 1:
        raise Refused(f"the parent is {parent}")
    os.kill(parent, signal.SIGKILL)
    return "done"


@attack("Stops its zygote", harm="zygote")
def stop_zygote(v: Victims) -> str:
    if (parent := os.getppid()) <= 1:
        raise Refused(f"the parent is {parent}")
    os.kill(parent, signal.SIGSTOP)
    return "done"


@attack("Takes the host's socket from its zygote", harm="")
def steal_from_zygote(v: Victims) -> str:
    parent = call("pidfd_open", os.getppid(), 0)
    for number in range(3, 32):
        try:
            sock = socket.socket(fileno=call("pidfd_getfd", parent, number, 0))
            return f"{number}: {sock.family}"
        except OSError as error:
            last = error
    raise last


# ---- limits and priorities of others


@attack("Makes another process less important", harm="process")
def priority_of_another(v: Victims) -> str:
    os.setpriority(os.PRIO_PROCESS, v.pid, 5)
    return "done"


@attack("Has another process run on one processor only", harm="process")
def affinity_of_another(v: Victims) -> str:
    os.sched_setaffinity(v.pid, {0})
    return "done"


@attack("Has another process run only when nothing else does", harm="process")
def scheduler_of_another(v: Victims) -> str:
    os.sched_setscheduler(v.pid, os.SCHED_IDLE, os.sched_param(0))
    return "done"


@attack("Has another process run only when nothing else does, by the newer call", harm="process")
def scheduler_of_another_2(v: Victims) -> str:
    return str(call("sched_setattr", v.pid, struct.pack("IIQiIQQQ", 48, 5, 0, 0, 0, 0, 0, 0), 0))


@attack("Takes away another process's right to open files", harm="process")
def limit_of_another(v: Victims) -> str:
    _, hard = resource.prlimit(v.pid, resource.RLIMIT_NOFILE)
    return f"{resource.prlimit(v.pid, resource.RLIMIT_NOFILE, (17, hard))}"


@attack("Reads the limits of another process")
def limit_read(v: Victims) -> str:
    return f"{resource.prlimit(v.pid, resource.RLIMIT_NOFILE)}"


@attack("Has another process wait for the disk longer", harm="process")
def disk_priority_of_another(v: Victims) -> str:
    return str(call("ioprio_set", 1, v.pid, 3 << 13))


@attack("Makes another process the first to be killed when memory is short", harm="process")
def oom_score_of_another(v: Victims) -> str:
    return str(Path(f"/proc/{v.pid}/oom_score_adj").write_text("500"))


@attack("Makes itself less likely to be killed when memory is short", root=True)
def oom_score_own(v: Victims) -> str:
    return str(Path("/proc/self/oom_score_adj").write_text("-500"))


@attack("Makes itself more important", root=True)
def priority_own(v: Victims) -> str:
    os.setpriority(os.PRIO_PROCESS, 0, -5)
    return "done"


@attack("Runs before everything else", root=True)
def realtime_own(v: Victims) -> str:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    return "done"


@attack("Becomes another user", root=True)
def user_change(v: Victims) -> str:
    wanted = 65534 if os.getuid() == 0 else 0
    return str(call("setuid", wanted))


@attack("Keeps the capabilities of root, or has gained some", root=True)
def capabilities_kept(v: Victims) -> str:
    found = ctypes.create_string_buffer(24)
    call("capget", struct.pack("Ii", 0x20080522, 0), found)
    effective, permitted, _, effective_2, permitted_2, _ = struct.unpack("6I", found.raw)
    if not effective | permitted | effective_2 | permitted_2:
        raise Refused("it has none")
    return f"{effective_2:08x}{effective:08x}"


@attack("Allows its memory to be read again, and every process to debug it")
def dumpable_again(v: Victims) -> str:
    return f"{call('prctl', 4, 1, 0, 0, 0)} {call('prctl', 3, 0, 0, 0, 0)}"  # PR_SET_DUMPABLE


# ---- processes that nobody knows of


def _child(pid: int) -> str:
    if pid == 0:
        time.sleep(20)
        os._exit(0)
    return f"pid {pid}"


@attack("Forks")
def fork_plain(v: Victims) -> str:
    return _child(os.fork())


@attack("Forks a daemon in a session of its own")
def fork_daemon(v: Victims) -> str:
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if pid := os.fork():
            os.write(writing, str(pid).encode())
            os._exit(0)
        for descriptor in range(256):
            try:
                os.close(descriptor)
            except OSError:
                pass
        time.sleep(20)
        os._exit(0)
    return f"pid {os.read(reading, 20).decode()}"


@attack("Makes a process whose parent is its own parent")
def fork_sibling(v: Victims) -> str:
    return _child(call("clone", _CLONE_PARENT | int(signal.SIGCHLD), 0, 0, 0, 0))


@attack("Makes a process with clone3, whose arguments no filter can see")
def fork_clone3(v: Victims) -> str:
    arguments = struct.pack("11Q", 0, 0, 0, 0, int(signal.SIGCHLD), 0, 0, 0, 0, 0, 0)
    return _child(call("clone3", arguments, len(arguments)))


@attack("Makes a process that may not be debugged and sends no signal at its end")
def fork_untraced(v: Victims) -> str:
    return _child(call("clone", _CLONE_UNTRACED, 0, 0, 0, 0))


@attack("Makes a process as root of a user namespace of its own")
def fork_user_namespace(v: Victims) -> str:
    return _child(call("clone", _CLONE_NEWUSER | int(signal.SIGCHLD), 0, 0, 0, 0))


@attack("Makes a process that shares its memory, but is no thread of it")
def fork_sharing_memory(v: Victims) -> str:
    stack = mmap.mmap(-1, 1 << 16)
    top = ctypes.addressof(ctypes.c_char.from_buffer(stack)) + (1 << 16)
    libc.clone.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p]
    sleep = ctypes.cast(libc.sleep, ctypes.c_void_p)
    pid = libc.clone(sleep, top, _CLONE_VM | int(signal.SIGCHLD), 20)
    if pid < 0:
        raise OSError(ctypes.get_errno(), "clone")
    _KEEP.append(stack)
    return f"pid {pid}"


_KEEP: list[object] = []


@attack("Starts a program that outlives it")
def spawn_daemon(v: Victims) -> str:
    return f"pid {subprocess.Popen(['/bin/sleep', '20'], start_new_session=True).pid}"
