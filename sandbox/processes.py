"""Forking and reaping, for the nursery and the zygotes. Single-threaded callers only."""

import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator

from . import pickling  # noqa: F401  # before multiprocess, which imports dill as it finds it

# isort: split
from multiprocess import process as multiprocess_process
from multiprocess.context import ForkProcess

from .confinement import kernel

__all__ = [
    "children",
    "descendants",
    "fork",
    "has_children",
    "reap",
    "receive",
    "set_child_subreaper",
    "set_name",
    "wake_on_child",
]

_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36


def set_name(name: str) -> None:
    """Name this process for ``ps`` and ``top`` (15 bytes of it)."""
    kernel.prctl(_PR_SET_NAME, name.encode()[:15])


def set_child_subreaper() -> None:
    """Become the parent of every descendant whose own parent dies, so that none can get away (prctl(2))."""
    kernel.prctl(_PR_SET_CHILD_SUBREAPER, 1)


class _Child(ForkProcess):  # type: ignore[misc]  # multiprocess has no types
    def _bootstrap(self, parent_sentinel: int) -> int:
        # In place of what prepares a child for pools, queues and a tidy exit, which writes half a megabyte of pages
        # that would else be shared. Ours end with _exit; what is left is an exit code for an exception.
        os.close(parent_sentinel)
        try:
            self.run()
        except BaseException:
            sys.excepthook(*sys.exc_info())
            return 1
        return 0


def fork(run: Callable[..., None], *args: object) -> int:
    """Run ``run(*args)`` in a forked child and return its pid. Raises ``OSError`` if the kernel refuses.

    ``multiprocess`` does the fork, with the standard streams flushed. Its registry of children and its sentinel pipes
    are given up at once: the registry is polled child by child at every start, and two pipes per worker would be
    inherited by all later ones. Exits are seen with ``reap``.
    """
    child = _Child(target=run, args=args)
    child.start()
    multiprocess_process._children.discard(child)
    child._popen.close()
    pid: int = child.pid
    return pid


def wake_on_child() -> int:
    """A descriptor that becomes readable when a child exits."""
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # a handler of Python's is what makes the wake-up be written
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def reap() -> Iterator[tuple[int, int]]:
    """Yield ``(pid, status)`` of each child that exited, status as ``os.waitstatus_to_exitcode`` gives it.

    What is left of the child's process group is killed before its pid is given back, while that still names the group.
    """
    while True:
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if info is None:
            return
        pid = info.si_pid
        try:
            os.killpg(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass  # no group of its own, or nobody left in it
        _, status = os.waitpid(pid, 0)
        yield pid, os.waitstatus_to_exitcode(status)


def has_children() -> bool:
    """Whether this process has a child, alive or not reaped yet."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _children_of_all() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as stat:
                    fields = stat.read().rpartition(b")")[2].split()
            except OSError:
                continue  # gone meanwhile
            children.setdefault(int(fields[1]), []).append(int(entry))
    return children


def children() -> list[int]:
    """The pids of this process's own children, as /proc shows them now; none where it may not be read."""
    try:
        return _children_of_all().get(os.getpid(), [])
    except OSError:
        return []


def descendants() -> list[int]:
    """The pids of all processes below this one, as /proc shows them now."""
    children = _children_of_all()
    found: list[int] = []
    front = [os.getpid()]
    while front:
        below = children.get(front.pop(), [])
        found += below
        front += below
    return found


def receive(sock: socket.socket, most: int, descriptors: list[int]) -> bytes:
    """``recv`` that appends the descriptors that came along to ``descriptors``, in order. For trusted peers only.

    They are not inherited by a program that is executed: a worker's socket is its identity.
    """
    try:
        data, received, _, _ = socket.recv_fds(sock, most, 8)
    except ConnectionResetError:  # the peer is gone and has left something of ours unread
        return b""
    for descriptor in received:
        os.set_inheritable(descriptor, False)  # recv_fds does not pass MSG_CMSG_CLOEXEC on
    descriptors += received
    return data
