"""Files: reading, writing and executing what is not the plugin's."""

import ctypes
import mmap
import os
import socket
import stat
import struct
import subprocess
import sys
from pathlib import Path

from .harness import Refused, Victims, attack, call, libc, scratch
from .network import find_link

_AT_FDCWD = -100
_O_PATH = 0o10000000
_AT_EMPTY_PATH = 0x1000
_RENAME_EXCHANGE = 2

# ---- reading


@attack("Opens /etc/passwd")
def read_etc(v: Victims) -> str:
    return Path("/etc/passwd").read_text()[:100]


@attack("Opens a file elsewhere by its path", harm="loot")
def read_file(v: Victims) -> str:
    return Path(v.file).read_text()


@attack("Opens a file elsewhere through a symbolic link in its own scratch folder", harm="loot")
def read_by_symlink(v: Victims) -> str:
    link = os.path.join(scratch(), "link")
    os.symlink(v.file, link)
    return Path(link).read_text()


@attack("Opens a file elsewhere through a chain of links to a folder above it", harm="loot")
def read_by_linked_folder(v: Victims) -> str:
    os.symlink(v.directory, os.path.join(scratch(), "folder"))
    os.symlink("folder", os.path.join(scratch(), "again"))
    return Path(scratch(), "again", os.path.basename(v.file)).read_text()


@attack("Opens a file elsewhere with `..` from its scratch folder", harm="loot")
def read_by_dots(v: Victims) -> str:
    return Path(scratch() + "/.." * 20 + v.file).read_text()


@attack("Opens a file elsewhere through /proc/self/root", harm="loot")
def read_by_proc_root(v: Victims) -> str:
    return Path("/proc/self/root" + v.file).read_text()


@attack("Opens a file elsewhere through /proc/self/cwd", harm="loot")
def read_by_proc_cwd(v: Victims) -> str:
    return Path("/proc/self/cwd" + "/.." * 20 + v.file).read_text()


@attack("Opens a file elsewhere through /proc/PID/root of another process", harm="loot")
def read_by_proc_of_another(v: Victims) -> str:
    return Path(f"/proc/{v.pid}/root{v.file}").read_text()


@attack("Opens a descriptor of another process through /proc/PID/fd", harm="loot")
def read_descriptor_of_another(v: Victims) -> str:
    return Path(f"/proc/{v.pid}/fd/{v.fd}").read_text()


@attack("Opens a file elsewhere relative to a descriptor of /", harm="loot")
def read_by_descriptor(v: Victims) -> str:
    root = os.open("/", _O_PATH | os.O_DIRECTORY)
    with open(os.open(v.file.lstrip("/"), os.O_RDONLY, dir_fd=root)) as file:
        return file.read()


@attack("Opens a file elsewhere with O_PATH and again through /proc/self/fd", harm="loot")
def read_by_reopening(v: Victims) -> str:
    descriptor = os.open(v.file, _O_PATH)
    return Path(f"/proc/self/fd/{descriptor}").read_text()


@attack("Opens a file elsewhere with O_PATH and again by the number of the process", harm="loot")
def read_by_reopening_dev_fd(v: Victims) -> str:
    descriptor = os.open(v.file, _O_PATH)
    return Path(f"/dev/fd/{descriptor}").read_text()


@attack("Opens a file elsewhere with openat2, whose arguments no filter can see", harm="loot")
def read_by_openat2(v: Victims) -> str:
    how = struct.pack("QQQ", os.O_RDONLY, 0, 0)
    with open(call("openat2", _AT_FDCWD, v.file.encode(), how, len(how))) as file:
        return file.read()


@attack("Opens a file elsewhere through a hard link that it makes to it", harm="loot")
def read_by_hard_link(v: Victims) -> str:
    link = os.path.join(v.directory, "hard")
    os.link(v.file, link)
    return Path(link).read_text()


@attack("Moves a file elsewhere into its scratch folder and opens it there", harm="file")
def read_by_renaming(v: Victims) -> str:
    target = os.path.join(scratch(), "moved")
    os.rename(v.file, target)
    return Path(target).read_text()


@attack("Opens a file elsewhere by a handle instead of a path", harm="loot", root=True)
def read_by_handle(v: Victims) -> str:
    handle = ctypes.create_string_buffer(struct.pack("I", 128) + bytes(132))
    mount = ctypes.c_int()
    call("name_to_handle_at", _AT_FDCWD, v.file.encode(), handle, ctypes.byref(mount), 0)
    folder = os.open(scratch(), os.O_RDONLY)
    with open(call("open_by_handle_at", folder, handle, os.O_RDONLY)) as file:
        return file.read()


@attack("Opens the file of another plugin", harm="loot")
def read_other_plugin(v: Victims) -> str:
    return Path(v.other_plugin).read_text()


@attack("Lists a folder elsewhere", harm="loot")
def list_folder(v: Victims) -> str:
    return " ".join(os.listdir(v.directory))


@attack("Lists the root of the machine and finds /etc and /home there")
def list_root(v: Victims) -> str:
    found = os.listdir("/")
    if not {"etc", "home", "root"} <= set(found):
        raise Refused(f"only {found}")
    return " ".join(found)


@attack("Reads what the kernel says about the process itself in /proc")
def read_proc_self(v: Victims) -> str:
    return Path("/proc/self/status").read_text()[:100]


@attack("Reads addresses of its own mappings, which are those of all workers of the plugin")
def read_proc_maps(v: Victims) -> str:
    return Path("/proc/self/maps").read_text()[:100]


@attack("Reads what /proc says about the machine")
def read_proc_machine(v: Victims) -> str:
    return Path("/proc/meminfo").read_text()[:100] + Path("/proc/mounts").read_text()[:100]


@attack("Reads what /sys says about the machine")
def read_sys(v: Victims) -> str:
    return " ".join(os.listdir("/sys/class/net")) + Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()


@attack("Opens the kernel's log", root=True)
def read_kernel_log(v: Victims) -> str:
    return str(os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK))


# ---- writing


@attack("Writes to a file elsewhere", harm="file")
def write_file(v: Victims) -> str:
    with open(v.file, "a") as file:
        return str(file.write("attacked"))


@attack("Writes to a file elsewhere through a mapping", harm="file")
def write_file_mapped(v: Victims) -> str:
    with open(v.file, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[:4] = b"evil"
    return "written"


@attack("Truncates a file elsewhere by its path", harm="file")
def truncate_file(v: Victims) -> str:
    os.truncate(v.file, 1)
    return "done"


@attack("Makes a file elsewhere", harm="file")
def create_file(v: Victims) -> str:
    return str(Path(v.directory, "new").write_text("attacked"))


@attack("Makes a nameless file elsewhere and then gives it a name", harm="file")
def create_nameless_file(v: Victims) -> str:
    descriptor = os.open(v.directory, os.O_TMPFILE | os.O_WRONLY, 0o600)
    name = os.path.join(v.directory, "was-nameless").encode()
    return str(call("linkat", _AT_FDCWD, f"/proc/self/fd/{descriptor}".encode(), _AT_FDCWD, name, 0x400))


@attack("Makes a folder elsewhere", harm="file")
def create_folder(v: Victims) -> str:
    os.mkdir(os.path.join(v.directory, "new"))
    return "done"


@attack("Makes a symbolic link elsewhere", harm="file")
def create_symlink(v: Victims) -> str:
    os.symlink("/etc/passwd", os.path.join(v.directory, "new"))
    return "done"


@attack("Makes a named pipe elsewhere", harm="file")
def create_pipe(v: Victims) -> str:
    os.mkfifo(os.path.join(v.directory, "new"))
    return "done"


@attack("Makes a device node in its scratch folder", root=True)
def create_device(v: Victims) -> str:
    path = os.path.join(scratch(), "device")
    os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    return str(os.stat(path))


@attack("Removes a file elsewhere", harm="file")
def remove_file(v: Victims) -> str:
    os.remove(v.file)
    return "done"


@attack("Removes a folder elsewhere", harm="file")
def remove_folder(v: Victims) -> str:
    os.rmdir(os.path.join(v.directory, "empty"))
    return "done"


@attack("Moves a file of its own to elsewhere", harm="file")
def move_out(v: Victims) -> str:
    mine = Path(scratch(), "mine")
    mine.write_text("attacked")
    os.rename(mine, os.path.join(v.directory, "new"))
    return "done"


@attack("Links a file of its own to elsewhere", harm="file")
def link_out(v: Victims) -> str:
    mine = Path(scratch(), "mine")
    mine.write_text("attacked")
    os.link(mine, os.path.join(v.directory, "new"))
    return "done"


@attack("Exchanges a file elsewhere for one of its own", harm="file")
def exchange_files(v: Victims) -> str:
    mine = Path(scratch(), "mine")
    mine.write_text("attacked")
    return str(call("renameat2", _AT_FDCWD, str(mine).encode(), _AT_FDCWD, v.file.encode(), _RENAME_EXCHANGE))


@attack("Writes to a descriptor of another process through /proc/PID/fd", harm="file")
def write_descriptor_of_another(v: Victims) -> str:
    with open(f"/proc/{v.pid}/fd/{v.fd}", "a") as file:
        return str(file.write("attacked"))


@attack("Writes into the plugin's own folder, which other orgs' workers read", harm="plugin")
def write_plugin_folder(v: Victims) -> str:
    return str(Path(__file__).with_name("left.by.attack").write_text("attacked"))


@attack("Writes to the plugin's own code, which other orgs' workers run", harm="plugin")
def write_plugin_code(v: Victims) -> str:
    with open(Path(__file__).parent.parent / "data.txt", "a") as file:
        return str(file.write("# attacked"))


@attack("Opens a module of the interpreter, which every process of the host imports, for writing", root=True)
def write_interpreter(v: Victims) -> str:
    return str(os.open(v.module, os.O_WRONLY))


@attack("Opens a control file of the kernel in /proc/sys for writing", root=True)
def open_proc_sys(v: Victims) -> str:
    return str(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))


# ---- executing


def elf(said: bytes) -> bytes:
    """The smallest program for x86-64 that writes ``said`` to its standard output and exits."""
    if os.uname().machine != "x86_64":
        raise Refused("for x86-64 only")
    base, header = 0x400000, 120
    code_size = 51
    text = base + header + code_size
    code = (
        b"\xb8\x01\0\0\0\xbf\x01\0\0\0\x48\xc7\xc6" + struct.pack("<i", text) + b"\xba" + struct.pack("<I", len(said))
    )
    code += b"\x0f\x05\xb8\x07\0\0\0\x31\xff\x31\xf6\xba\xf4\x01\0\0\x0f\x05"  # poll(): stays for 0.5 s
    code += b"\xb8\x3c\0\0\0\x31\xff\x0f\x05"
    code = code.ljust(code_size, b"\xcc")
    size = header + len(code) + len(said)
    head = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, base + header, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    )
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, base, base, size, size, 4096)
    return head + segment + code + said


def _said(v: Victims) -> bytes:
    """What the program is to say. The host shall not notice that the worker is another program now."""
    os.set_inheritable(find_link(), True)
    return f"executed {v.token}\n".encode()


def _script(v: Victims) -> list[str]:
    return ["-c", f"echo '{_said(v).decode()}'; exec sleep 0.5"]


def _vector(*texts: bytes) -> ctypes.Array[ctypes.c_char_p]:
    return (ctypes.c_char_p * (len(texts) + 1))(*texts, None)


@attack("Executes a program of the machine in its own place", harm="log", silent=True)
def execute_program(v: Victims) -> None:
    os.execv("/bin/sh", ["sh", *_script(v)])


@attack("Executes the interpreter, which it may read, in its own place", harm="log", silent=True)
def execute_interpreter(v: Victims) -> None:
    os.execv(sys.executable, [sys.executable, "-c", f"import time; print({_said(v)!r}, flush=True); time.sleep(0.5)"])


@attack("Executes a program that it has written to its scratch folder", harm="log", silent=True)
def execute_own_file(v: Victims) -> None:
    path = Path(scratch(), "program")
    path.write_bytes(elf(_said(v)))
    path.chmod(0o700)
    os.execv(path, ["program"])


@attack("Executes a program from anonymous memory", harm="log", silent=True)
def execute_memory(v: Victims) -> None:
    descriptor = os.memfd_create("program")
    os.write(descriptor, elf(_said(v)))
    call("execveat", descriptor, b"", _vector(b"program"), _vector(), _AT_EMPTY_PATH)


@attack("Executes a nameless file from its scratch folder", harm="log", silent=True)
def execute_nameless_file(v: Victims) -> None:
    writable = os.open(scratch(), os.O_TMPFILE | os.O_RDWR, 0o700)
    os.write(writable, elf(_said(v)))
    readable = os.open(f"/proc/self/fd/{writable}", os.O_RDONLY)
    os.close(writable)
    call("execveat", readable, b"", _vector(b"program"), _vector(), _AT_EMPTY_PATH)


@attack("Executes a file that is not executable with the dynamic loader", harm="log", silent=True)
def execute_by_loader(v: Victims) -> None:
    loader = "/lib64/ld-linux-x86-64.so.2" if os.uname().machine == "x86_64" else "/lib/ld-linux-aarch64.so.1"
    os.execv(loader, [loader, os.path.realpath("/bin/sh"), *_script(v)])


@attack("Starts a program of the machine as a child", harm="loot")
def execute_child(v: Victims) -> str:
    return subprocess.run(["/bin/cat", v.file], capture_output=True, text=True, check=True).stdout


@attack("Starts a program of the machine with posix_spawn", harm="loot")
def execute_spawned(v: Victims) -> str:
    reading, writing = os.pipe()
    child = os.posix_spawn("/bin/cat", ["cat", v.file], {}, file_actions=[(os.POSIX_SPAWN_DUP2, writing, 1)])
    os.close(writing)
    os.waitpid(child, 0)
    return os.read(reading, 1000).decode()


@attack("Starts a shell with system()", harm="file")
def execute_system(v: Victims) -> str:
    if status := os.system(f"echo attacked > '{v.directory}/new'"):
        raise Refused(f"status {status}")
    return "done"


@attack("Leaves a program in its scratch folder that runs as its owner whoever starts it")
def make_setuid(v: Victims) -> str:
    path = Path(scratch(), "program")
    path.write_bytes(b"#!/bin/sh\n")
    path.chmod(0o4755)
    if not path.stat().st_mode & stat.S_ISUID:
        raise Refused("the bit is not there")
    return oct(path.stat().st_mode)


@attack("Makes a named pipe in its scratch folder")
def create_own_pipe(v: Victims) -> str:
    path = os.path.join(scratch(), "pipe")
    os.mkfifo(path)
    return oct(os.stat(path).st_mode)


@attack("Makes a socket file in its scratch folder with mknod")
def create_own_socket_file(v: Victims) -> str:
    path = os.path.join(scratch(), "socket")
    os.mknod(path, 0o600 | stat.S_IFSOCK)
    return oct(os.stat(path).st_mode)


@attack("Opens a new terminal")
def open_terminal(v: Victims) -> str:
    master, slave = os.openpty()
    return os.ttyname(slave) + str(master)


@attack("Loads a library of the machine that it has no need of, by its name", harm="")
def load_library_elsewhere(v: Victims) -> str:
    for name in ("libcap.so.2", "libsystemd.so.0", "libmount.so.1", "libselinux.so.1"):
        for folder in ("/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib/aarch64-linux-gnu"):
            if os.path.exists(os.path.join(folder, name)):
                return str(ctypes.CDLL(os.path.join(folder, name)))
    raise Refused("there is none")


@attack("Takes a descriptor that the machine's services might have left open", harm="loot")
def read_inherited_descriptors(v: Victims) -> str:
    found = []
    for descriptor in range(3, 256):
        try:
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                found.append(os.pread(descriptor, 1000, 0).decode(errors="replace"))
        except OSError:
            pass
    if not found:
        raise Refused("no file is open")
    return " ".join(found)


@attack("Opens another worker's standard output through /proc/PID/fd", harm="log")
def write_output_of_another(v: Victims) -> str:
    with open(f"/proc/{v.peer_pid}/fd/1", "wb", buffering=0) as file:
        return str(file.write(_said(v)))


@attack("Passes a descriptor of a file elsewhere to itself with a Unix socket", harm="loot")
def read_by_passing(v: Victims) -> str:
    one, other = socket.socketpair()
    descriptor = os.open(v.file, _O_PATH)
    socket.send_fds(one, [b"x"], [descriptor])
    _, [received], _, _ = socket.recv_fds(other, 1, 1)
    buffer = ctypes.create_string_buffer(1000)
    got = libc.read(received, buffer, 1000)
    if got <= 0:
        return Path(f"/proc/self/fd/{received}").read_text()
    return buffer.value.decode()
