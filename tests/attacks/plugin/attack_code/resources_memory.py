"""Resources: memory of every kind. Each takes 1 GiB at most, and gives it back."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator

from .harness import Refused, Victims, attack, call, libc

_STEP = 64 << 20
_ENOUGH = 1 << 30
_PAGE = bytes(1 << 20)


@contextlib.contextmanager
def _mappings(flags: int) -> Iterator[int]:
    held = []
    try:
        for _ in range(_ENOUGH // _STEP):
            area = mmap.mmap(-1, _STEP, flags=flags)
            held.append(area)
            start = ctypes.c_char.from_buffer(area)
            ctypes.memset(ctypes.addressof(start), 1, _STEP)
            del start
        yield len(held) * _STEP
    finally:
        for area in held:
            area.close()


@attack("Fills 1 GiB of private memory", ends=True)
def memory_private(v: Victims) -> str:
    with _mappings(mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as size:
        return f"{size} bytes"


@attack("Fills 1 GiB of shared memory", ends=True)
def memory_shared(v: Victims) -> str:
    with _mappings(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as size:
        return f"{size} bytes"


@attack("Fills 1 GiB of shared memory and keeps it for 3 s", ends=True)
def memory_shared_kept(v: Victims) -> str:
    with _mappings(mmap.MAP_SHARED | mmap.MAP_ANONYMOUS) as size:
        time.sleep(3)
        return f"{size} bytes"


@attack("Fills 1 GiB of the heap", ends=True)
def memory_heap(v: Victims) -> str:
    held = [b"x" * _STEP for _ in range(_ENOUGH // _STEP)]
    return f"{sum(map(len, held))} bytes"


@attack("Fills 1 GiB with files in memory, which are mapped nowhere", ends=True)
def memory_files(v: Victims) -> str:
    held, size = [], 0
    try:
        while size < _ENOUGH:
            held.append(os.memfd_create("x"))
            for _ in range(32):
                size += os.write(held[-1], _PAGE)
        return f"{size} bytes"
    finally:
        for descriptor in held:
            os.close(descriptor)


@attack("Fills 1 GiB with segments of System V, which are attached nowhere", ends=True)
def memory_segments(v: Victims) -> str:
    held: list[int] = []
    libc.shmat.restype = ctypes.c_void_p
    try:
        for number in range(_ENOUGH // _STEP):  # keys that the judge knows, who removes what is left
            held.append(call("shmget", int(v.place, 16) * 64 + number + 1, _STEP, 0o1600))
            address = libc.shmat(held[-1], None, 0)
            if address in (None, ctypes.c_void_p(-1).value):
                raise OSError(ctypes.get_errno(), "shmat")
            ctypes.memset(address, 1, _STEP)
            libc.shmdt(ctypes.c_void_p(address))
        return f"{len(held) * _STEP} bytes"
    finally:
        for segment in held:
            libc.shmctl(segment, 0, None)


@attack("Fills 200 MiB of /dev/shm", ends=True)
def memory_device(v: Victims) -> str:
    path = f"/dev/shm/hayattack-{v.place}"
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(200):
                file.write(_PAGE)
        return "200 MiB"
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


@attack("Fills 200 MiB of the kernel's memory with what waits in pipes", ends=True, root=True)
def memory_pipes(v: Victims) -> str:
    held: list[int] = []
    size = 0
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
        while size < 200 << 20:
            held += os.pipe()
            with contextlib.suppress(OSError):
                fcntl.fcntl(held[-1], 1031, 1 << 20)  # F_SETPIPE_SZ: for ordinary users only the first few grow
            os.set_blocking(held[-1], False)
            size += os.write(held[-1], _PAGE)
        return f"{size} bytes in {len(held)} descriptors"
    finally:
        for descriptor in held:
            os.close(descriptor)


@attack("Fills 200 MiB of the kernel's memory with what waits in sockets", ends=True)
def memory_sockets(v: Victims) -> str:
    held: list[socket.socket] = []
    size = 0
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    try:
        while size < 200 << 20:
            held += socket.socketpair()
            held[-1].setblocking(False)
            held[-1].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 22)
            with contextlib.suppress(BlockingIOError):
                while True:
                    size += held[-1].send(_PAGE)
        return f"{size} bytes in {len(held)} sockets"
    finally:
        for sock in held:
            sock.close()


@attack("Hides 200 pairs of sockets with what waits in them by passing them along in others", ends=True)
def memory_passed(v: Victims) -> str:
    carriers = [socket.socketpair() for _ in range(4)]
    kept = 0
    try:
        for one, _ in carriers:
            one.setblocking(False)
            for _ in range(50):
                inner, end = socket.socketpair()
                with inner, end:
                    inner.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        inner.send(bytes(100_000))
                    socket.send_fds(one, [b"x"], [inner.fileno(), end.fileno()])
                kept += 1
        return f"{kept} pairs"
    finally:
        for one, other in carriers:
            one.close()
            other.close()


@attack("Fills 768 MiB of the stacks of threads", ends=True)
def memory_stacks(v: Victims) -> str:
    threading.stack_size(64 << 20)
    done, filled, failed = threading.Event(), threading.Semaphore(0), []

    def fill() -> None:
        try:
            buffer = (ctypes.c_char * (1 << 20))()
            ctypes.memset(buffer, 1, len(buffer))
            touch = mmap.mmap(-1, 48 << 20)
            start = ctypes.c_char.from_buffer(touch)
            ctypes.memset(ctypes.addressof(start), 1, len(touch))
            del start
            filled.release()
            done.wait()
            touch.close()
        except (OSError, MemoryError) as error:
            failed.append(error)
            filled.release()

    threads = [threading.Thread(target=fill) for _ in range(16)]
    try:
        for thread in threads:
            thread.start()
        for _ in threads:
            filled.acquire(timeout=30)  # all at once, however slowly they start
    finally:
        done.set()
        for thread in threads:
            if thread.ident:
                thread.join()
        threading.stack_size(0)
    if failed:
        raise Refused(str(failed[0]))
    return f"{len(threads)} stacks"


@attack("Reserves 8 TiB of addresses", ends=True)
def memory_reserved(v: Victims) -> str:
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    address = libc.mmap(None, ctypes.c_size_t(1 << 43), 0, flags, -1, ctypes.c_long(0))
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(1 << 43))
    return "8 TiB"


@attack("Makes 16 MiB of memory stay when memory is short", root=True)
def memory_locked(v: Victims) -> str:
    area = mmap.mmap(-1, 16 << 20)
    address = ctypes.addressof(ctypes.c_char.from_buffer(area))
    return str(call("mlock2", address, 16 << 20, 0))


@attack("Allows itself more memory than it was given")
def memory_limit_raised(v: Victims) -> str:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return "unlimited"


@attack("Makes 30,000 mappings, each of which costs the kernel memory", ends=True)
def memory_mappings(v: Victims) -> str:
    libc.mmap.restype = ctypes.c_void_p
    size = 60_000 * 4096
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000
    base = libc.mmap(None, ctypes.c_size_t(size), 0, flags, -1, ctypes.c_long(0))
    if base in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        for number in range(30_000):
            page = ctypes.c_void_p(base + 8192 * number)
            if libc.mprotect(page, ctypes.c_size_t(4096), 1):
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return "30,000 mappings"
    finally:
        libc.munmap(ctypes.c_void_p(base), ctypes.c_size_t(size))
