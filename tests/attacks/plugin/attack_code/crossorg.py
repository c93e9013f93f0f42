"""Cross-org: two orgs of the same plugin, with workers that come from the same zygote, try to find each other."""

import asyncio
import builtins
import contextlib
import ctypes
import fcntl
import json
import os
import random
import signal
import socket
import struct
from multiprocessing import shared_memory
from pathlib import Path
from typing import Any

from . import at_import
from .harness import Refused, Victims, attack, call, libc
from .processes import read_memory

_KEEP: list[Any] = []
_GLOBAL: dict[str, str] = {}
_OWN = Path(__file__).parent.parent / "data.txt"
_BUFFER = ctypes.create_string_buffer(64)
"""At the same address in all workers of the plugin."""


class _Class:
    seen = ""


def _temporary() -> str:
    return os.environ.get("TMPDIR", "/tmp")


def _shared(name: str) -> Any:
    if name not in at_import.SHARED:
        raise Refused(f"the import left no {name}: {at_import.SHARED}")
    return at_import.SHARED[name]


def _memory(v: Victims) -> str:
    memory = _shared("memory")
    if v.stage == "leave":
        memory[: len(v.token)] = v.token.encode()
        return "left"
    return bytes(memory[:64]).rstrip(b"\0").decode()


for _kind in ("memory", "memory-file", "segment"):

    def _run(v: Victims) -> str:
        return _memory(v)

    _run.__name__ = f"import_{_kind.replace('-', '_')}"
    _about = {
        "memory": "Leaves anonymous shared memory for its workers while it is imported",
        "memory-file": "Leaves a mapped file in memory for its workers while it is imported",
        "segment": "Leaves a segment of System V for its workers while it is imported",
    }[_kind]
    attack(_about, plugin=f"import-{_kind}", stages=True, harm="loot", ends=True)(_run)


def _descriptor(v: Victims) -> str:
    descriptor = _shared("descriptor")
    if v.stage == "leave":
        return str(os.pwrite(descriptor, v.token.encode(), 0))
    return os.pread(descriptor, 64, 0).decode()


@attack(
    "Leaves an open file for its workers while it is imported",
    plugin="import-file",
    stages=True,
    harm="loot",
    ends=True,
    host=True,
)
def import_file(v: Victims) -> str:
    return _descriptor(v)


@attack(
    "Leaves an open file in memory for its workers while it is imported",
    plugin="import-memory-descriptor",
    host=True,
    stages=True,
    harm="loot",
    ends=True,
)
def import_memory_descriptor(v: Victims) -> str:
    return _descriptor(v)


@attack(
    "Puts an open file in the place of its standard input while it is imported",
    plugin="import-stdin",
    stages=True,
    harm="loot",
    ends=True,
)
def import_stdin(v: Victims) -> str:
    return _descriptor(v)


@attack(
    "Replaces the functions that close descriptors and confine workers, and shares a file",
    plugin="import-lie",
    stages=True,
    harm="loot",
    ends=True,
)
def import_lie(v: Victims) -> str:
    return _descriptor(v)


def _pair(v: Victims) -> str:
    writing, reading = _shared("pair")
    if v.stage == "leave":
        return str(os.write(writing, v.token.encode()))
    os.set_blocking(reading, False)
    return os.read(reading, 64).decode()


@attack(
    "Leaves a pair of sockets for its workers while it is imported",
    plugin="import-pair",
    stages=True,
    harm="loot",
    ends=True,
    host=True,
)
def import_pair(v: Victims) -> str:
    return _pair(v)


@attack(
    "Leaves a pipe for its workers while it is imported",
    plugin="import-pipe",
    stages=True,
    harm="loot",
    ends=True,
    host=True,
)
def import_pipe(v: Victims) -> str:
    return _pair(v)


@attack("Leaves a process behind while it is imported", plugin="import-helper", ends=True)
def import_helper(v: Victims) -> str:
    helper = _shared("helper")
    try:
        os.kill(helper, 0)
    except PermissionError:
        raise
    return f"pid {helper}"


@attack("Leaves a thread behind that Python does not know of", plugin="import-hidden-thread", ends=True, host=True)
def import_hidden_thread(v: Victims) -> str:
    if v.strict:
        raise Refused("it is not forked")
    return "its zygote has two threads, and is forked"


@attack(
    "Forks in a thread that it left behind while it was imported, before the worker was confined",
    plugin="import-thread",
)
def old_thread_forks(v: Victims) -> str:
    def fork() -> int:
        if (child := os.fork()) == 0:
            os._exit(0)
        return child

    return f"forked {_shared('thread')(fork)}"


@attack(
    "Reads a file elsewhere in a thread that it left behind while it was imported", plugin="import-thread", harm="loot"
)
def old_thread_reads(v: Victims) -> str:
    return str(_shared("thread")(Path(v.file).read_text))


@attack(
    "Ends another org's worker in a thread that it left behind while it was imported",
    plugin="import-thread",
    stages=True,
    ends=True,  # the number may be its own: each of these workers has a process tree of its own
    harm="peer",
)
def old_thread_kills(v: Victims) -> str:
    if v.stage == "leave":
        return "left"
    return f"{_shared('thread')(lambda: os.kill(v.peer_pid, signal.SIGKILL))}"


# ---- what is no secret channel but would be if workers were shared


@attack("Sets a global variable that another org's worker might see", stages=True, harm="loot", host=True)
def leave_global(v: Victims) -> str:
    if v.stage == "leave":
        _GLOBAL["x"] = _Class.seen = v.token
        builtins.hayattack = v.token  # type: ignore[attr-defined]
        return "left"
    return json.dumps([_GLOBAL, _Class.seen, getattr(builtins, "hayattack", "")])


@attack("Sets an environment variable that another org's worker might see", stages=True, harm="loot", host=True)
def leave_environment(v: Victims) -> str:
    if v.stage == "leave":
        os.environ["HAYATTACK"] = v.token
        return "left"
    return json.dumps(dict(os.environ))


@attack("Predicts the random numbers of another org's worker", stages=True, host=True)
def leave_random(v: Victims) -> str:
    if v.stage == "leave":
        return f"random {random.random()} {os.urandom(4).hex()}"
    if f"{random.random()}" in v.left:
        return "the same"
    raise Refused("another")


# ---- files


def _file(v: Victims, path: str) -> str:
    if v.stage == "leave":
        return str(Path(path).write_text(v.token))
    try:
        return Path(path).read_text()
    finally:
        with contextlib.suppress(OSError):
            os.unlink(path)


@attack("Leaves a file with a known name in $TMPDIR", stages=True, harm="loot")
def leave_temporary(v: Victims) -> str:
    return _file(v, os.path.join(_temporary(), f"hayattack-{v.place}"))


@attack("Leaves a file with a known name in /tmp", stages=True, harm="loot")
def leave_tmp(v: Victims) -> str:
    return _file(v, f"/tmp/hayattack-{v.place}")


@attack("Leaves a file with a known name in /var/tmp", stages=True, harm="loot")
def leave_var_tmp(v: Victims) -> str:
    return _file(v, f"/var/tmp/hayattack-{v.place}")


@attack("Leaves a file with a known name in /dev/shm", stages=True, harm="loot")
def leave_shm(v: Victims) -> str:
    return _file(v, f"/dev/shm/hayattack-{v.place}")


@attack("Leaves a file in the plugin's folder, its working directory", stages=True, harm="loot")
def leave_working_directory(v: Victims) -> str:
    return _file(v, f"hayattack-{v.place}")


@attack("Leaves a file in its home folder", stages=True, harm="loot")
def leave_home(v: Victims) -> str:
    return _file(v, os.path.expanduser(f"~/hayattack-{v.place}"))


@attack("Finds a file that the same org's worker before it left", stages=True, again=True, harm="loot")
def leave_for_next(v: Victims) -> str:
    return _file(v, os.path.join(_temporary(), f"hayattack-{v.place}-next"))


@attack("Reads another org's scratch folder, beside its own", stages=True, harm="loot")
def read_sibling_scratch(v: Victims) -> str:
    name = f"hayattack-{v.place}-sibling"
    if v.stage == "leave":
        Path(_temporary(), name).write_text(v.token)
        return _temporary()
    candidates = [v.peer_scratch, *(str(path) for path in Path(_temporary()).parent.iterdir())]
    for folder in candidates:
        with contextlib.suppress(OSError):
            text = Path(folder, name).read_text()
            if folder == _temporary():
                os.unlink(os.path.join(folder, name))
            return text
    raise Refused("there is none")


@attack("Opens the folder of another org's scratch by its path", stages=True, harm="loot")
def read_peer_scratch(v: Victims) -> str:
    name = f"hayattack-{v.place}-peer"
    if v.stage == "leave":
        Path(_temporary(), name).write_text(v.token)
        return "left"
    path = Path(v.peer_scratch, name)
    return path.read_text()


# ---- the kernel's own shared things


@attack("Leaves a segment of shared memory with a known key", stages=True, harm="loot")
def leave_segment(v: Victims) -> str:
    libc.shmat.restype = ctypes.c_void_p
    segment = call("shmget", int(v.place, 16) * 64, 4096, 0o1600 if v.stage == "leave" else 0o600)
    address = libc.shmat(segment, None, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "shmat")
    if v.stage == "leave":
        ctypes.memmove(address, v.token.encode(), len(v.token))
        return "left"
    libc.shmctl(segment, 0, None)
    return ctypes.string_at(address).decode()


@attack("Leaves a message with a known key", stages=True, harm="loot")
def leave_message(v: Victims) -> str:
    queue = call("msgget", int(v.place, 16) * 64, 0o1600 if v.stage == "leave" else 0o600)
    if v.stage == "leave":
        return str(call("msgsnd", queue, struct.pack("l", 1) + v.token.encode(), len(v.token), 0o4000))
    buffer = ctypes.create_string_buffer(200)
    call("msgrcv", queue, buffer, 190, 0, 0o4000)
    call("msgctl", queue, 0, None)
    return buffer.raw[8:].rstrip(b"\0").decode()


@attack("Leaves a set of semaphores with a known key", stages=True)
def leave_semaphore(v: Victims) -> str:
    number = call("semget", int(v.place, 16) * 64, 1, 0o1600 if v.stage == "leave" else 0o600)
    if v.stage == "find":
        libc.semctl(number, 0, 0)
    return str(number)


@attack("Leaves a message in a POSIX queue", stages=True, harm="loot")
def leave_queue(v: Victims) -> str:
    name = f"hayattack-{v.place}".encode()
    if v.stage == "leave":
        queue = call(
            "mq_open", name, os.O_CREAT | os.O_RDWR | os.O_NONBLOCK, 0o600, struct.pack("8l", 0, 4, 256, 0, 0, 0, 0, 0)
        )
        return str(call("mq_timedsend", queue, v.token.encode(), len(v.token), 0, None))
    queue = call("mq_open", name, os.O_RDWR | os.O_NONBLOCK, 0, None)
    buffer = ctypes.create_string_buffer(256)
    call("mq_unlink", name)
    call("mq_timedreceive", queue, buffer, 256, None, None)
    return buffer.value.decode()


@attack("Leaves shared memory as the standard library makes it", stages=True, harm="loot")
def leave_shared_memory(v: Victims) -> str:
    if v.stage == "leave":
        memory = shared_memory.SharedMemory(f"hayattack-{v.place}", create=True, size=4096)
        view: Any = memory.buf
        view[: len(v.token)] = v.token.encode()
        _KEEP.append(memory)
        return "left"
    memory = shared_memory.SharedMemory(f"hayattack-{v.place}")
    found: Any = memory.buf
    text = bytes(found[:64]).rstrip(b"\0").decode()
    memory.unlink()
    return text


@attack("Leaves a key in the user's keyring", stages=True, harm="loot")
def leave_key(v: Victims) -> str:
    if v.stage == "leave":
        return str(call("add_key", b"user", f"hayattack-{v.place}".encode(), v.token.encode(), len(v.token), -4))
    key = call("keyctl", 10, -4, b"user", f"hayattack-{v.place}".encode(), 0)
    buffer = ctypes.create_string_buffer(64)
    call("keyctl", 11, key, buffer, 64)
    call("keyctl", 9, key, -4)
    return buffer.value.decode()


@attack("Listens on an abstract socket for another org's worker", stages=True, harm="loot")
def leave_abstract_socket(v: Victims) -> str:
    name = f"\0hayattack-{v.place}"
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    if v.stage == "leave":
        sock.bind(name)
        sock.setblocking(False)
        _KEEP.append(sock)

        def answer() -> None:
            with contextlib.suppress(OSError):
                _, address = sock.recvfrom(10)
                sock.sendto(v.token.encode(), address)

        asyncio.get_running_loop().add_reader(sock, answer)
        return "left"
    sock.bind("")
    sock.settimeout(2)
    sock.sendto(b"?", name)
    return sock.recv(64).decode()


@attack("Listens on a TCP port for another org's worker", stages=True, harm="loot")
def leave_port(v: Victims) -> str:
    if v.stage == "leave":
        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.setblocking(False)
        _KEEP.append(server)

        def answer() -> None:
            connection, _ = server.accept()
            connection.sendall(v.token.encode())
            connection.close()

        asyncio.get_running_loop().add_reader(server, answer)
        return f"port {server.getsockname()[1]}"
    with socket.create_connection(("127.0.0.1", int(v.left.split()[1])), 2) as sock:
        return sock.recv(64).decode()


@attack("Stores a secret in its memory that another org's worker reads there", stages=True, harm="loot")
def read_peer_memory(v: Victims) -> str:
    if v.stage == "leave":
        _BUFFER.value = v.token.encode()
        return "left"
    return read_memory(v.peer_pid, ctypes.addressof(_BUFFER), 64).rstrip("\0")


@attack("Takes the socket of another org's worker", stages=True)
def steal_from_peer(v: Victims) -> str:
    if v.stage == "leave":
        return "left"
    peer = call("pidfd_open", v.peer_pid, 0)
    last: Exception = Refused("there is none")
    for number in range(3, 32):
        try:
            sock = socket.socket(fileno=call("pidfd_getfd", peer, number, 0))
            return f"{number}: {sock.family}"
        except OSError as error:
            last = error
    raise last


@attack("Ends another org's worker", stages=True, harm="peer")
def kill_peer(v: Victims) -> str:
    if v.stage == "leave":
        return "left"
    os.kill(v.peer_pid, signal.SIGKILL)
    return "done"


@attack("Ends another org's worker with a descriptor's owner", stages=True, harm="peer")
def kill_peer_by_owner(v: Victims) -> str:
    if v.stage == "leave":
        return "left"
    one, other = socket.socketpair()
    fcntl.fcntl(one, 10, int(signal.SIGTERM))
    fcntl.fcntl(one, fcntl.F_SETOWN, v.peer_pid)
    fcntl.fcntl(one, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    return str(other.send(b"x"))
