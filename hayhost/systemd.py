"""What systemd hands to a service and wants to hear from it: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

The variables that say so are taken out of the environment: they are for this process, and for no child of it.
"""

import asyncio
import os
import socket
import stat
from collections.abc import MutableMapping, Sequence
from typing import Final

from .errors import HostError
from .logs import get_logger

__all__ = ["Service", "passed_sockets"]

_FIRST: Final = 3
"""The first descriptor that is passed (SD_LISTEN_FDS_START)."""
_MOST: Final = 64
_PINGS: Final = 3
"""Signs of life within the time in which systemd wants one: one that is late is not the end."""
# systemd reads at once. If it does not, the host is of more use without it.
_PATIENCE: Final = 1.0


class Service:
    """The host as a service: tells systemd how it is doing, if it wants to hear. What cannot be said is logged once."""

    def __init__(self, address: str = "", watchdog: float = 0.0, sockets: Sequence[socket.socket] = ()) -> None:
        """``address`` is that of systemd's datagram socket, a path or ``@`` and an abstract name.

        With ``watchdog``, a sign of life is due within each that many seconds. ``sockets`` are to be listened on.
        """
        self.sockets: Final = sockets
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self._watchdog = watchdog if address else 0.0
        self._failed = False
        self._timer: asyncio.TimerHandle | None = None

    @classmethod
    def from_environment(cls, environ: MutableMapping[str, str] | None = None) -> "Service":
        """What ``NOTIFY_SOCKET``, ``WATCHDOG_USEC``, ``WATCHDOG_PID`` and the like ask for; they are taken out.

        Raises ``HostError`` as ``passed_sockets``.
        """
        environ = os.environ if environ is None else environ
        address = environ.pop("NOTIFY_SOCKET", "")
        interval, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        if address and not (address.startswith(("/", "@")) and len(address) > 1):
            get_logger().warning("systemd is not told anything: NOTIFY_SOCKET is neither a path nor an abstract name")
            address = ""
        watchdog = 0.0
        if not pid or pid == str(os.getpid()):
            watchdog = int(interval) / 1e6 if interval.isascii() and interval.isdigit() else 0.0
        return cls(address, watchdog, passed_sockets(environ))

    def loading(self, plugins: int) -> None:
        """The port listens, and the plugins are being loaded."""
        self._tell(f"STATUS=Loading {plugins} plugins")

    def ready(self, status: str) -> None:
        """The service does what it is for."""
        self._tell(f"READY=1\nSTATUS={status}")

    def stopping(self) -> None:
        """The service has begun to stop."""
        self._tell("STOPPING=1\nSTATUS=Finishing requests and stopping workers")

    def watch(self) -> None:
        """Send signs of life from the running loop until ``close``: if that hangs, they stay out."""
        if self._watchdog:
            self._tell("WATCHDOG=1", wait=False)
            self._timer = asyncio.get_running_loop().call_later(self._watchdog / _PINGS, self.watch)

    def close(self) -> None:
        """Send no more signs of life. Closing twice is safe."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tell(self, state: str, *, wait: bool = True) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(_PATIENCE if wait else 0)
                sock.sendto(state.encode(), self._address)
        except OSError as error:
            if not self._failed:
                self._failed = True
                get_logger().warning("systemd could not be told how the host is doing", reason=str(error))
        else:
            self._failed = False


def passed_sockets(environ: MutableMapping[str, str] | None = None) -> list[socket.socket]:
    """The listening sockets that a socket unit passes to this process; empty if there is none.

    ``LISTEN_PID``, ``LISTEN_FDS`` and ``LISTEN_FDNAMES`` are taken out. Raises ``HostError`` if something was passed on
    which HTTP cannot be served.
    """
    environ = os.environ if environ is None else environ
    pid, count, names = (environ.pop(f"LISTEN_{name}", "") for name in ("PID", "FDS", "FDNAMES"))
    if pid != str(os.getpid()) or not count:
        return []  # nothing, or somebody else's: the variables were inherited
    if not (count.isascii() and count.isdigit() and int(count) <= _MOST):
        raise HostError(f"LISTEN_FDS: {count!r} is not a number from 0 to {_MOST}")
    labels = names.split(":") if names else []
    passed: list[socket.socket] = []
    try:
        for index in range(int(count)):
            label = labels[index] if index < len(labels) and labels[index] else "unknown"
            passed.append(_listening(_FIRST + index, label))
    except BaseException:
        for sock in passed:
            sock.close()
        raise
    return passed


def _listening(descriptor: int, label: str) -> socket.socket:
    what = f"descriptor {descriptor} ({label}), which LISTEN_FDS passes"
    try:
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except OSError:
        raise HostError(f"{what}, is not open") from None
    if not is_socket:
        raise HostError(f"{what}, is not a socket")
    os.set_inheritable(descriptor, False)
    sock = socket.socket(fileno=descriptor)
    if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
        sock.close()
        raise HostError(f"{what}, is not a TCP socket")
    if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        sock.close()
        raise HostError(f"{what}, does not listen: Accept= must be no in the socket unit")
    sock.setblocking(False)
    return sock
