"""Resources: processors, processes, descriptors, disk, and what the host itself has little of."""

import asyncio
import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import resource
import select
import signal
import sys
import threading
import time
from pathlib import Path

from .harness import Refused, Victims, attack, call, scratch

_PAGE = bytes(1 << 20)


def _raise_limit(name: int) -> None:
    _, hard = resource.getrlimit(name)
    resource.setrlimit(name, (hard, hard))


@attack("Starts 300 processes", ends=True)
def fork_bomb(v: Victims) -> str:
    children: list[int] = []
    reading, writing = os.pipe()
    try:
        for _ in range(300):
            child = os.fork()
            if child == 0:
                os.close(writing)
                os.read(reading, 1)
                os._exit(0)
            children.append(child)
        return f"{len(children)} processes"
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _threads(count: int, seconds: float) -> str:
    threading.stack_size(64 << 10)
    done = threading.Event()
    threads: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=done.wait)
            thread.start()
            threads.append(thread)
        time.sleep(seconds)
        return f"{len(threads)} threads"
    finally:
        done.set()
        for thread in threads:
            thread.join()
        threading.stack_size(0)


@attack("Starts 500 threads", ends=True)
def threads_many(v: Victims) -> str:
    return _threads(500, 0)


@attack("Starts 500 threads and keeps them for 3 s", ends=True)
def threads_kept(v: Victims) -> str:
    return _threads(500, 3)


@attack("Opens 10,000 files")
def files_open(v: Victims) -> str:
    held: list[int] = []
    _raise_limit(resource.RLIMIT_NOFILE)
    nothing = os.open(os.devnull if os.path.exists(os.devnull) else __file__, os.O_RDONLY)
    try:
        for _ in range(10_000):
            held.append(os.dup(nothing))
        return f"{len(held)} descriptors"
    finally:
        for descriptor in held:
            os.close(descriptor)


@attack("Makes 20,000 empty files in its scratch folder")
def files_many(v: Victims) -> str:
    folder = os.open(scratch(), os.O_RDONLY)
    for number in range(20_000):
        os.close(os.open(str(number), os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    return "20,000 files"


@attack("Makes 500 folders within each other in its scratch folder")
def folders_deep(v: Victims) -> str:
    folder = os.open(scratch(), os.O_RDONLY)
    top = folder
    try:
        for _ in range(500):
            os.mkdir("d", dir_fd=folder)
            below = os.open("d", os.O_RDONLY, dir_fd=folder)
            if folder != top:
                os.close(folder)
            folder = below
    finally:
        os.close(folder)
    # What removes it recursively must bear this, too: here it is taken apart from above.
    name = scratch()
    while os.path.isdir(os.path.join(name, "d")):
        os.rename(os.path.join(name, "d"), os.path.join(name, "old"))
        if os.path.isdir(os.path.join(name, "old", "d")):
            os.rename(os.path.join(name, "old", "d"), os.path.join(name, "d"))
        os.rmdir(os.path.join(name, "old"))
    return "500 folders"


@attack("Fills 200 MiB of its scratch folder with one file")
def disk_one_file(v: Victims) -> str:
    with open(os.path.join(scratch(), "big"), "wb", buffering=0) as file:
        for _ in range(200):
            file.write(_PAGE)
    return "200 MiB"


@attack("Fills 200 MiB of its scratch folder with many files")
def disk_many_files(v: Victims) -> str:
    for number in range(200):
        with open(os.path.join(scratch(), str(number)), "wb", buffering=0) as file:
            if file.write(_PAGE) < len(_PAGE):
                raise Refused("full")
    return "200 MiB"


@attack("Fills 200 MiB of its scratch folder with files that it removes and keeps open")
def disk_removed_files(v: Victims) -> str:
    held = []
    try:
        for number in range(200):
            path = os.path.join(scratch(), str(number))
            held.append(os.open(path, os.O_CREAT | os.O_RDWR))
            os.unlink(path)
            if os.write(held[-1], _PAGE) < len(_PAGE):
                raise Refused("full")
        return "200 MiB"
    finally:
        for descriptor in held:
            os.close(descriptor)


@attack("Reserves 200 MiB of its scratch folder without writing")
def disk_reserved(v: Victims) -> str:
    descriptor = os.open(os.path.join(scratch(), "big"), os.O_CREAT | os.O_RDWR)
    os.posix_fallocate(descriptor, 0, 200 << 20)
    return "done"


@attack("Makes a file that seems to have a terabyte")
def disk_sparse(v: Victims) -> str:
    path = os.path.join(scratch(), "big")
    Path(path).touch()
    os.truncate(path, 1 << 40)
    return "done"


@attack("Computes for 5 s in an async handler and answers nobody", ends=True, host=True)
async def cpu_loop(v: Victims) -> str:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        pass
    return "5 s"


@attack("Computes for 5 s with the interpreter's lock held: a regular expression", ends=True, host=True)
async def cpu_regex(v: Victims) -> str:
    end = time.monotonic() + 5
    length = 20
    while time.monotonic() < end:
        re.match(r"(x+x+)+y", "x" * length)
        length += 1
    return "5 s"


@attack("Computes for 5 s with the interpreter's lock held: one large number", ends=True, host=True)
async def cpu_number(v: Victims) -> str:
    end = time.monotonic() + 5
    size = 2_000_000
    while time.monotonic() < end:
        size = size * 3 // 2
        _ = (1 << size) // 3 * 7 % 1_000_003
        _ = pow(3, size // 8)
    return "5 s"


@attack("Computes on all processors for 4 s: more than one processor's time", ends=True)
async def cpu_all(v: Victims) -> str:
    begun, end = time.process_time(), time.monotonic() + 4

    def compute() -> None:
        while time.monotonic() < end:
            hashlib.pbkdf2_hmac("sha256", b"x", b"y", 50_000)

    loop = asyncio.get_running_loop()
    await asyncio.gather(*[loop.run_in_executor(None, compute) for _ in range(4)])
    used = time.process_time() - begun
    if used < 5.2:
        raise Refused(f"{used:.1f} s")
    return f"{used:.1f} s"


@attack("Recurses without an end", ends=True, host=True)
async def recursion(v: Victims) -> str:
    sys.setrecursionlimit(1 << 30)
    threading.stack_size(0)

    class Deep:
        def __getattr__(self, name: str) -> object:
            return getattr(self, name + "x")

    try:
        return str(Deep().nothing)
    except RecursionError as error:
        raise Refused("recursion error") from error


@attack("Writes 20,000 lines to the log", harm="flood", host=True)
async def log_flood(v: Victims) -> str:
    for number in range(20_000):
        print(f"flood {v.token} {number}")
    return "done"


@attack("Writes 20 MB to its raw output", harm="flood", host=True)
async def output_flood(v: Victims) -> str:
    line = f"flood {v.token} ".encode() + b"x" * 85 + b"\n"
    for _ in range(20_000):
        os.write(1, line * 10)
    return "done"


@attack("Allows itself to leave its memory on the disk when it dies")
def core_dump(v: Victims) -> str:
    resource.setrlimit(resource.RLIMIT_CORE, (1 << 30, 1 << 30))
    return "1 GiB"


@attack("Allows itself more open files, processes and signals than it was given")
def limits_raised(v: Victims) -> str:
    most = resource.RLIM_INFINITY
    for limit in (resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (most, most))
    return "unlimited"


@attack("Makes 5,000 timers of the kernel")
def timers_many(v: Victims) -> str:
    made = []
    event = (0).to_bytes(8, "little") + (10).to_bytes(4, "little") + (1).to_bytes(4, "little") + bytes(48)
    for _ in range(5_000):
        number = ctypes.c_int()
        call("timer_create", 1, event, ctypes.byref(number))
        made.append(number.value)
    return f"{len(made)} timers"


@attack("Keeps 2,000 event queues of the kernel")
def watchers_many(v: Victims) -> str:
    _raise_limit(resource.RLIMIT_NOFILE)
    held = []
    with contextlib.ExitStack() as stack:
        for _ in range(2_000):
            held.append(stack.enter_context(select.epoll()))
        return f"{len(held)} queues"


@attack("Keeps 2,000 file locks")
def locks_many(v: Victims) -> str:
    with open(os.path.join(scratch(), "locked"), "wb") as file:
        for number in range(2_000):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 2 * number)
    return "2,000 locks"


@attack("Ignores being asked to stop", ends=True, harm="leftover", host=True)
async def stop_ignored(v: Victims) -> str:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return f"pid {os.getpid()}"
