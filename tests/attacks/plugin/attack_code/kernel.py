"""The kernel's surface: what a plugin never needs and attackers look for bugs in."""

import ctypes
import errno
import mmap
import os
import struct
from typing import Any

from . import harness
from .harness import REACHED, Refused, Victims, attack, call, libc, scratch

_NAMESPACES = {
    "user": 0x10000000,
    "mount": 0x20000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x8000000,
    "uts": 0x4000000,
    "cgroup": 0x2000000,
    "time": 0x80,
}


def _surface(name: str, about: str, syscall: str, *arguments: Any, **options: Any) -> None:
    harness.surface(name, about, syscall, *arguments, module=__name__, **options)


_NO_PATH = b"/nonexistent/hayattack"

_surface("io-uring", "Makes a ring for system calls that no filter sees", "io_uring_setup", 4, bytes(120), reached=())
_surface("io-setup", "Makes a context for asynchronous input and output", "io_setup", 1, ctypes.create_string_buffer(8))
_surface("bpf", "Makes a map in the kernel", "bpf", 0, struct.pack("IIIII", 2, 4, 4, 1, 0) + bytes(100), 120, root=True)
_surface(
    "perf-event",
    "Counts what happens on the machine",
    "perf_event_open",
    struct.pack("IIQ", 1, 128, 1) + bytes(112),
    0,
    -1,
    -1,
    0,
)
_surface("userfaultfd", "Handles its own page faults", "userfaultfd", os.O_CLOEXEC | 1, reached=())
_surface("keyring-add", "Adds a key to a keyring in the kernel", "add_key", b"user", b"hayattack", b"x", 1, -2)
_surface(
    "keyring-request",
    "Has the kernel start a program that finds a key",
    "request_key",
    b"user",
    b"hayattack-none",
    None,
    -4,
    reached=(126,),
)
_surface("keyring-join", "Makes a new keyring for its session", "keyctl", 1, None)
_surface("mount", "Mounts a file system", "mount", None, _NO_PATH, None, 0, None, root=True)
_surface("unmount", "Unmounts a file system", "umount2", _NO_PATH, 0, root=True)
_surface("mount-open", "Makes a file system with the newer calls", "fsopen", b"tmpfs", 0, root=True)
_surface("mount-pick", "Reconfigures a file system", "fspick", -100, _NO_PATH, 0, root=True)
_surface("mount-tree", "Takes a part of the tree of mounts", "open_tree", -100, b"/", 0)
_surface(
    "mount-tree-attributes", "Takes a part of the tree with the newest call", "open_tree_attr", -100, b"/", 0, None, 0
)
_surface("mount-clone", "Copies a part of the tree of mounts", "open_tree", -100, b"/", 1, root=True)
_surface("mount-move", "Moves a mount", "move_mount", -1, b"", -1, b"", 0, root=True)
_surface("mount-attributes", "Changes the flags of a mount", "mount_setattr", -1, b"", 0x1000, bytes(32), 32, root=True)
_surface(
    "mount-list", "Lists the mounts", "listmount", struct.pack("IIQQ", 24, 0, 0xFFFFFFFFFFFFFFFF, 0), bytes(80), 10, 0
)
_surface(
    "mount-details",
    "Asks for the details of a mount",
    "statmount",
    struct.pack("IIQQ", 24, 0, 1, 1),
    bytes(512),
    512,
    0,
)
_surface("pivot-root", "Changes the root of its namespace", "pivot_root", _NO_PATH, _NO_PATH, root=True)
_surface("chroot", "Changes its root folder", "chroot", _NO_PATH, root=True)
_surface("quota", "Asks for quotas", "quotactl", 0x80000100, None, 0, bytes(64))
_surface(
    "quota-descriptor",
    "Asks for quotas of an open file",
    "quotactl_fd",
    0,
    0x80000700,
    0,
    bytes(64),
    reached=(*REACHED, errno.EOPNOTSUPP),
)
_surface("swap-on", "Has the machine swap to a file", "swapon", _NO_PATH, 0, root=True)
_surface("swap-off", "Has the machine not swap", "swapoff", _NO_PATH, root=True)
_surface("reboot", "Restarts the machine (with a wrong password)", "reboot", 1, 2, 3, 4, root=True)
_surface("kernel-log", "Reads the kernel's log", "syslog", 10, None, 0, root=True)
_surface("accounting", "Has the kernel log every process", "acct", _NO_PATH, root=True)
_surface("clock-set", "Sets the machine's clock", "clock_settime", 0, struct.pack("qq", 0, -1), root=True)
_surface(
    "clock-set-older", "Sets the machine's clock with the older call", "settimeofday", struct.pack("qq", 0, -1), None
)
_surface("clock-adjust", "Reads how the machine's clock is adjusted", "adjtimex", bytes(256))
_surface("clock-adjust-newer", "Reads the same with the newer call", "clock_adjtime", 0, bytes(256))
_surface("host-name", "Renames the machine", "sethostname", None, -1, root=True)
_surface("domain-name", "Renames the machine's domain", "setdomainname", None, -1, root=True)
_surface("module-load", "Loads a kernel module", "init_module", None, 0, None, root=True)
_surface("module-load-file", "Loads a kernel module from a file", "finit_module", -1, b"", 0, root=True)
_surface("module-unload", "Unloads a kernel module", "delete_module", b"hayattack", 0o4000, root=True)
_surface("kernel-load", "Loads another kernel", "kexec_load", 0, 17, None, 0xFFFF, root=True)
_surface("kernel-load-file", "Loads another kernel from a file", "kexec_file_load", -1, -1, 0, None, 0x1000, root=True)
_surface("hang-up", "Takes the terminal from everybody", "vhangup", root=True)
_surface("personality", "Has its addresses not be random", "personality", 0x0040000)
_surface(
    "cross-memory",
    "Calls for the memory of other processes at all",
    "process_vm_readv",
    os.getpid(),
    None,
    0,
    None,
    0,
    0,
)
_surface("numa-policy", "Chooses memory nodes", "mbind", 0, 4096, 0, None, 0, 0)
_surface("numa-policy-default", "Chooses memory nodes for all", "set_mempolicy", 0, None, 0)
_surface("fanotify", "Makes a watcher of whole file systems", "fanotify_init", 0x200, 0)
_surface("inotify", "Makes a watcher of files", "inotify_init1", 0)
_surface("memory-secret", "Makes memory that the kernel itself cannot see", "memfd_secret", 0)
_surface("memory-file", "Makes a file in memory", "memfd_create", b"x", 0)
_surface(
    "security-modules",
    "Lists the security modules",
    "lsm_list_modules",
    bytes(64),
    ctypes.byref(ctypes.c_uint32(64)),
    0,
)
_surface("splice", "Moves pages between files and pipes", "splice", -1, None, -1, None, 1, 0)
_surface("gift-pages", "Gives pages of its memory to a pipe", "vmsplice", -1, None, 0, 0)
_surface("remap-pages", "Remaps the pages of a file", "remap_file_pages", 0, 0, 0, 0, 0)
_surface("protection-keys", "Makes keys for its memory", "pkey_alloc", 0, 0, reached=(*REACHED, errno.ENOSPC))
_surface("shadow-stack", "Makes a shadow stack", "map_shadow_stack", 0, 4096, 0, reached=(errno.EOPNOTSUPP,))
_surface("directory-cookie", "Asks for a path by a cookie", "lookup_dcookie", 0, bytes(64), 64, root=True)
_surface("file-systems", "Lists the kernel's file systems", "sysfs", 3)
_surface("library-use", "Loads a library the way of 1992", "uselib", _NO_PATH)
_surface("io-ports", "Gets access to the machine's ports", "ioperm", 0x80, 1, 0)
_surface("io-privilege", "Gets access to all of the machine's ports", "iopl", 0, reached=(errno.EINVAL,))
_surface("local-descriptors", "Reads the processor's table of its segments", "modify_ldt", 0, bytes(64), 64)
_surface("signal-descriptor", "Reads its signals from a descriptor", "signalfd4", -1, bytes(8), 8, 0)


def _add_namespace(name: str, flag: int) -> None:
    def enter(_v: Victims) -> str:
        return str(call("unshare", flag))

    def join(_v: Victims) -> str:
        return harness.probe("setns", os.open("/dev/null", os.O_RDONLY), flag, reached=(errno.EINVAL,))

    ordinary = name == "user"
    harness._add(
        f"namespace-{name}",
        __name__,
        f"Makes a {name} namespace",
        enter,
        root=not ordinary,
        success="it is in a new one",
    )
    about = f"Joins a {name} namespace"
    harness._add(f"namespace-join-{name}", __name__, about, join, success="the kernel judges the descriptor")


for _name, _flag in _NAMESPACES.items():
    _add_namespace(_name, _flag)


@attack("Becomes root in a user namespace and mounts a file system there")
def user_namespace_mount(v: Victims) -> str:
    if os.getuid():
        call("unshare", 0x10000000 | 0x20000)
    else:
        call("unshare", 0x20000)
    folder = scratch().encode()
    call("mount", None, b"/", None, 1 << 18 | 1 << 14, None)  # private: nobody else sees it
    call("mount", b"none", folder, b"tmpfs", 0, None)
    return str(call("umount2", folder, 2))


@attack("Joins the namespaces of another process")
def namespace_of_another(v: Victims) -> str:
    other = call("pidfd_open", v.pid, 0)
    return harness.probe("setns", other, 0x20000 | 0x10000000, reached=(errno.EINVAL,))


def _machine_code(code: bytes) -> int:
    if os.uname().machine != "x86_64":
        raise Refused("for x86-64 only")
    libc.mmap.restype = ctypes.c_void_p
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    function = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(page)))
    result: int = function()
    return result


@attack("Makes system calls by the 32-bit gate, whose numbers are others", ends=True)
def other_abi_32(v: Victims) -> str:
    result = _machine_code(b"\x53\xb8\x14\x00\x00\x00\xcd\x80\x48\x98\x5b\xc3")  # getpid is 20 there
    if result != os.getpid():
        raise Refused(f"it returned {result}")
    return f"getpid said {result}"


@attack("Makes a socket by the 32-bit gate", ends=True)
def other_abi_32_socket(v: Victims) -> str:
    # socket is 359 there: AF_UNIX, SOCK_DGRAM
    result = _machine_code(b"\x53\xb8\x67\x01\x00\x00\xbb\x01\0\0\0\xb9\x02\0\0\0\x31\xd2\xcd\x80\x48\x98\x5b\xc3")
    if result < 0:
        raise Refused(f"it returned {result}")
    return f"descriptor {result}"


@attack("Makes system calls by the x32 numbers", ends=True)
def other_abi_x32(v: Victims) -> str:
    if os.uname().machine != "x86_64":
        raise Refused("for x86-64 only")
    return str(harness.call_number(0x40000000 | 39))


@attack("Makes a system call whose number has bits that the kernel ignores", ends=True)
def number_with_high_bits(v: Victims) -> str:
    if os.uname().machine != "x86_64":
        raise Refused("for x86-64 only")
    libc.syscall.restype = ctypes.c_long
    number = harness.NUMBERS["memfd_create"] | 1 << 32
    result: int = libc.syscall(ctypes.c_long(number), b"x", ctypes.c_long(0))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return str(result)


@attack("Makes a socket with an argument whose upper half is not zero", ends=True)
def argument_with_high_bits(v: Victims) -> str:
    return str(call("socket", 1 << 32 | 2, 1 << 32 | 1, 0))


@attack("Types into a terminal as if the user did", root=True)
def type_into_terminal(v: Victims) -> str:
    import fcntl

    _master, slave = os.openpty()
    fcntl.ioctl(slave, 0x5412, b"x")
    return "typed"


@attack("Removes its filters by installing one that allows all")
def filter_again(v: Victims) -> str:
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    program = struct.pack("HxxxxxxP", 1, ctypes.addressof(allow))
    call("prctl", 38, 1, 0, 0, 0)
    call("seccomp", 1, 0, program)
    return str(call("memfd_create", b"x", 0))


@attack("Hears of its own system calls from a filter that asks a supervisor")
def filter_listener(v: Victims) -> str:
    allow = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    call("prctl", 38, 1, 0, 0, 0)
    return str(call("seccomp", 1, 8, struct.pack("HxxxxxxP", 1, ctypes.addressof(allow))))
