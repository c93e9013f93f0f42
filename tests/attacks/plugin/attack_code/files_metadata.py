"""Files: what is not content. Landlock covers none of this."""

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path

from .harness import Refused, Victims, attack, call, libc, scratch

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_O_PATH = 0o10000000
_BUFFER = 4096


def _own() -> str:
    """A file of the plugin's, readable to all its workers."""
    return str(Path(__file__).parent.parent / "data.txt")


# ---- looking


@attack("Asks for size and times of a file elsewhere")
def stat_file(v: Victims) -> str:
    return str(os.stat(v.file))


@attack("Asks for size and times of a file elsewhere with statx")
def statx_file(v: Victims) -> str:
    return str(call("statx", _AT_FDCWD, v.file.encode(), 0, 0x7FF, ctypes.create_string_buffer(256)))


@attack("Asks for size and times of a file elsewhere through an O_PATH descriptor")
def stat_descriptor(v: Victims) -> str:
    return str(os.fstat(os.open(v.file, _O_PATH)))


@attack("Reads where a symbolic link elsewhere leads to", harm="loot")
def read_link(v: Victims) -> str:
    found: str = os.readlink(v.link)
    return found


@attack("Reads where a symbolic link elsewhere leads to through an O_PATH descriptor", harm="loot")
def read_link_descriptor(v: Victims) -> str:
    descriptor = os.open(v.link, _O_PATH | os.O_NOFOLLOW)
    buffer = ctypes.create_string_buffer(_BUFFER)
    call("readlinkat", descriptor, b"", buffer, _BUFFER)
    return buffer.value.decode()


@attack("Asks whether a file elsewhere is there and accessible")
def access_file(v: Victims) -> str:
    return str(call("faccessat", _AT_FDCWD, v.file.encode(), os.R_OK))


@attack("Asks the same with the newer call")
def access_file_2(v: Victims) -> str:
    return str(call("faccessat2", _AT_FDCWD, v.file.encode(), os.R_OK, 0))


@attack("Tells whether a file elsewhere is there from the error that opening it gives")
def exists_by_error(v: Victims) -> str:
    errors = []
    for path in (v.file, v.file + "-missing"):
        try:
            os.close(os.open(path, os.O_RDONLY))
            errors.append(0)
        except OSError as error:
            errors.append(error.errno or 0)
    if errors[0] == errors[1]:
        raise Refused(f"both say {errno.errorcode.get(errors[0])}")
    return f"{errors}"


@attack("Tells whether a file elsewhere is there from the error that executing it gives")
def exists_by_execute(v: Victims) -> str:
    errors = []
    for path in (v.file, v.file + "-missing"):
        try:
            os.execv(path, ["x"])
        except OSError as error:
            errors.append(error.errno)
    if errors[0] == errors[1]:
        raise Refused(f"both say {errors[0]}")
    return f"{errors}"


@attack("Changes its working directory to a folder elsewhere")
def change_directory(v: Victims) -> str:
    before = os.open(".", os.O_RDONLY)
    try:
        os.chdir(v.directory)
        return "done"
    finally:
        os.fchdir(before)


@attack("Reads an extended attribute of a file elsewhere", harm="loot")
def read_attribute(v: Victims) -> str:
    return os.getxattr(v.file, "user.secret").decode()


@attack("Reads an extended attribute with a call newer than most filters", harm="loot")
def read_attribute_at(v: Victims) -> str:
    buffer = ctypes.create_string_buffer(_BUFFER)
    arguments = struct.pack("QII", ctypes.addressof(buffer), _BUFFER, 0)
    call("getxattrat", _AT_FDCWD, v.file.encode(), 0, b"user.secret", arguments, len(arguments))
    return buffer.value.decode()


@attack("Lists the extended attributes of a file elsewhere")
def list_attributes(v: Victims) -> str:
    return " ".join(os.listxattr(v.file))


@attack("Asks for size and fill of the file system of a folder elsewhere")
def stat_file_system(v: Victims) -> str:
    return str(os.statvfs(v.directory))


@attack("Asks for a handle of a file elsewhere, by which it can be told apart")
def handle_of_file(v: Victims) -> str:
    handle = ctypes.create_string_buffer(struct.pack("I", 128) + bytes(132))
    call("name_to_handle_at", _AT_FDCWD, v.file.encode(), handle, ctypes.byref(ctypes.c_int()), 0)
    return handle.raw[:40].hex()


@attack("Watches a folder elsewhere with inotify")
def watch_folder(v: Victims) -> str:
    watcher = call("inotify_init1", os.O_NONBLOCK)
    return str(call("inotify_add_watch", watcher, v.directory.encode(), 0xFFF))


@attack("Watches the plugin's own folder with inotify, and so what the other orgs' workers do there")
def watch_plugin(v: Victims) -> str:
    watcher = call("inotify_init1", os.O_NONBLOCK)
    return str(call("inotify_add_watch", watcher, os.path.dirname(_own()).encode(), 0xFFF))


@attack("Watches a folder elsewhere with fanotify")
def watch_folder_fanotify(v: Victims) -> str:
    watcher = call("fanotify_init", 0x200 | 2, 0)  # FAN_REPORT_FID, non-blocking: allowed to anyone
    return str(call("fanotify_mark", watcher, 1, 0x100 | 2, _AT_FDCWD, v.directory.encode()))


@attack("Watches the plugin's own folder with the signals of fcntl")
def watch_plugin_dnotify(v: Victims) -> str:
    descriptor = os.open(os.path.dirname(_own()), os.O_RDONLY)
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, 28)  # SIGWINCH, which nobody minds
    return str(fcntl.fcntl(descriptor, fcntl.F_NOTIFY, fcntl.DN_MODIFY | fcntl.DN_CREATE))


@attack("Sees in the page cache which pages of a shared file others have used")
def page_cache(v: Victims) -> str:
    descriptor = os.open(_own(), os.O_RDONLY)
    found = ctypes.create_string_buffer(40)
    return str(call("cachestat", descriptor, struct.pack("QQ", 0, 0), found, 0)) + found.raw.hex()


@attack("Sees with mincore which pages of a shared file are in memory")
def page_cache_mincore(v: Victims) -> str:
    descriptor = os.open(_own(), os.O_RDONLY)
    libc.mmap.restype = ctypes.c_void_p
    address = libc.mmap(None, ctypes.c_size_t(4096), 1, 1, descriptor, ctypes.c_long(0))
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    found = ctypes.create_string_buffer(1)
    try:
        call("mincore", address, 4096, found)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(4096))
    return found.raw.hex()


@attack("Sees which pages of a shared file are in memory by reading without waiting")
def page_cache_reading(v: Victims) -> str:
    descriptor = os.open(_own(), os.O_RDONLY)
    try:
        return f"in memory: {os.preadv(descriptor, [bytearray(16)], 0, os.RWF_NOWAIT)}"
    except BlockingIOError:
        return "not in memory"


# ---- changing


@attack("Changes the permissions of a file elsewhere", harm="file")
def change_mode(v: Victims) -> str:
    os.chmod(v.file, 0o777)
    return "done"


@attack("Changes the permissions of a file elsewhere with a call newer than most filters", harm="file")
def change_mode_2(v: Victims) -> str:
    return str(call("fchmodat2", _AT_FDCWD, v.file.encode(), 0o777, 0))


@attack("Changes the permissions of a file elsewhere through an O_PATH descriptor", harm="file")
def change_mode_descriptor(v: Victims) -> str:
    return str(call("fchmodat2", os.open(v.file, _O_PATH), b"", 0o777, _AT_EMPTY_PATH))


@attack("Changes the permissions of a file elsewhere through /proc/self/fd", harm="file")
def change_mode_proc(v: Victims) -> str:
    os.chmod(f"/proc/self/fd/{os.open(v.file, _O_PATH)}", 0o777)
    return "done"


@attack("Changes the owner of a file elsewhere", harm="file", root=True)
def change_owner(v: Victims) -> str:
    os.chown(v.file, 65534, 65534)
    return "done"


@attack("Changes the owner of a file elsewhere through an O_PATH descriptor", harm="file", root=True)
def change_owner_descriptor(v: Victims) -> str:
    return str(call("fchownat", os.open(v.file, _O_PATH), b"", 65534, 65534, _AT_EMPTY_PATH))


@attack("Changes the times of a file elsewhere", harm="file")
def change_times(v: Victims) -> str:
    os.utime(v.file, (1, 1))
    return "done"


@attack("Changes the times of a file elsewhere through an O_PATH descriptor", harm="file")
def change_times_descriptor(v: Victims) -> str:
    times = struct.pack("qqqq", 1, 0, 1, 0)
    return str(call("utimensat", os.open(v.file, _O_PATH), b"", times, _AT_EMPTY_PATH))


@attack("Sets an extended attribute of a file elsewhere", harm="file")
def change_attribute(v: Victims) -> str:
    os.setxattr(v.file, "user.attack", b"1")
    return "done"


@attack("Sets an extended attribute with a call newer than most filters", harm="file")
def change_attribute_at(v: Victims) -> str:
    value = ctypes.create_string_buffer(b"1")
    arguments = struct.pack("QII", ctypes.addressof(value), 1, 0)
    return str(call("setxattrat", _AT_FDCWD, v.file.encode(), 0, b"user.attack", arguments, len(arguments)))


@attack("Removes an extended attribute of a file elsewhere", harm="file")
def remove_attribute(v: Victims) -> str:
    os.removexattr(v.file, "user.secret")
    return "done"


@attack("Changes the permissions of the plugin's own file, which it has open for reading", harm="plugin")
def change_own_mode(v: Victims) -> str:
    os.fchmod(os.open(_own(), os.O_RDONLY), 0o666)
    return "done"


@attack("Changes the times of the plugin's own file, which it has open for reading", harm="plugin")
def change_own_times(v: Victims) -> str:
    os.utime(os.open(_own(), os.O_RDONLY), (1, 1))
    return "done"


@attack("Changes the times of the plugin's own file by its path", harm="plugin")
def change_own_times_by_path(v: Victims) -> str:
    os.utime(_own(), (1, 1))
    return "done"


@attack("Sets an extended attribute of the plugin's own file, which it has open for reading", harm="plugin")
def change_own_attribute(v: Victims) -> str:
    os.setxattr(os.open(_own(), os.O_RDONLY), "user.attack", b"1")
    return "done"


@attack("Marks the plugin's own file with the flags of its file system", harm="plugin")
def change_own_flags(v: Victims) -> str:
    descriptor = os.open(_own(), os.O_RDONLY)
    [flags] = struct.unpack("l", fcntl.ioctl(descriptor, 0x80086601, bytes(8)))  # FS_IOC_GETFLAGS
    fcntl.ioctl(descriptor, 0x40086602, struct.pack("l", flags | 0x80))  # FS_IOC_SETFLAGS: no atime
    return "set"


@attack("Holds a lease on the plugin's own file, so that whoever writes it waits")
def lease_own_file(v: Victims) -> str:
    return str(fcntl.fcntl(os.open(_own(), os.O_RDONLY), fcntl.F_SETLEASE, fcntl.F_RDLCK))


@attack("Makes its scratch folder accessible to everybody")
def open_scratch(v: Victims) -> str:
    folder = os.environ.get("TMPDIR", "/tmp")
    own = scratch() if folder == "/tmp" else folder
    os.chmod(own, 0o777)
    return own
