"""What a hostile plugin does while it is imported, before there are orgs: it leaves something for all its workers."""

import ctypes
import mmap
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from .harness import call, libc

__all__ = ["KINDS", "SHARED", "ask", "prepare"]

SHARED: dict[str, Any] = {}


def _memory() -> None:
    SHARED["memory"] = mmap.mmap(-1, 4096, flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)


def _memory_file() -> None:
    descriptor = os.memfd_create("shared")
    os.ftruncate(descriptor, 4096)
    SHARED["memory"] = mmap.mmap(descriptor, 4096)


def _segment() -> None:
    segment = call("shmget", 0, 4096, 0o1600)
    libc.shmat.restype = ctypes.c_void_p
    address = libc.shmat(segment, None, 0)
    libc.shmctl(segment, 0, None)  # it goes with the last process that has it
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError("shmat")
    SHARED["memory"] = (ctypes.c_char * 4096).from_address(address)


def _file() -> None:
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"hayattack-import-{os.getpid()}")
    SHARED["descriptor"] = os.open(path, os.O_CREAT | os.O_RDWR)
    os.unlink(path)


def _memory_descriptor() -> None:
    SHARED["descriptor"] = os.memfd_create("shared")


def _pair() -> None:
    SHARED["pair"] = [end.detach() for end in socket.socketpair()]


def _pipe() -> None:
    SHARED["pair"] = list(reversed(os.pipe()))


def _lie() -> None:
    """Have the runtime not close descriptors, and not confine itself, after the fork."""
    import sandbox.confinement

    _memory_descriptor()

    def nothing(*_arguments: Any, **_options: Any) -> None:
        pass

    os.closerange = nothing
    os.close_range = nothing  # type: ignore[attr-defined]
    confinement = sandbox.confinement
    for name in ("after_fork", "close_all_but"):
        if hasattr(confinement, name):
            setattr(confinement, name, nothing)
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("sandbox.confinement"):
            for name in ("after_fork", "close_all_but"):
                if hasattr(module, name):
                    setattr(module, name, nothing)


def _hook() -> None:
    """Hide a descriptor under the number of a standard stream as soon as a worker is forked."""
    _memory_descriptor()
    os.dup2(SHARED["descriptor"], 0)
    SHARED["descriptor"] = 0


def _helper() -> None:
    """Leave a process behind that outlives the import."""
    child = os.fork()
    if child == 0:
        for descriptor in range(256):
            try:
                os.close(descriptor)
            except OSError:
                pass
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
        os._exit(0)
    SHARED["helper"] = child


_TASKS: queue.Queue[Callable[[], Any]] = queue.Queue()
_RESULTS: queue.Queue[Any] = queue.Queue()


def _thread() -> None:
    """Leave a thread behind that does what it is told later: the plugin is not forked, its zygotes become workers."""

    def work() -> None:
        while True:
            task = _TASKS.get()
            try:
                _RESULTS.put(task())
            except Exception as error:
                _RESULTS.put(error)

    threading.Thread(target=work, daemon=True).start()
    SHARED["thread"] = ask


def ask(task: Callable[[], Any]) -> Any:
    """Have the thread that was left behind do something."""
    _TASKS.put(task)
    result = _RESULTS.get(timeout=3)
    if isinstance(result, Exception):
        raise result
    return result


def _hidden_thread() -> None:
    """Leave a thread behind that Python does not know of."""
    thread = ctypes.c_ulong()
    libc.pthread_create.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    if libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.sleep, ctypes.c_void_p), 3600):
        raise OSError("pthread_create")


KINDS = {
    "import-memory": _memory,
    "import-memory-file": _memory_file,
    "import-segment": _segment,
    "import-file": _file,
    "import-memory-descriptor": _memory_descriptor,
    "import-pair": _pair,
    "import-pipe": _pipe,
    "import-lie": _lie,
    "import-stdin": _hook,
    "import-helper": _helper,
    "import-hidden-thread": _hidden_thread,
    "import-thread": _thread,
}


def prepare(kind: str) -> None:
    """Do it. What is refused already now is left out: the attack fails later, for want of it."""
    try:
        KINDS[kind]()
    except OSError as error:
        SHARED["refused"] = error
