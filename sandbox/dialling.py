"""A worker's side of the egress broker: what may be connected to, names for addresses, and asking for connections.

Nothing here waits, except for the first word of the broker, which is there as soon as the worker has its org.
"""

import _socket
import errno
import os
import select
import socket
import threading
from collections import OrderedDict
from ipaddress import IPv4Address
from typing import Final

import msgspec

from .broker.messages import Answer, Dial, Done, Greeting
from .broker.names import Rules, literal, normalise

__all__ = [
    "LOADING",
    "UNDECLARED",
    "address_of",
    "answer",
    "check",
    "dial",
    "done",
    "name_of",
    "refuse",
    "target",
    "use",
    "wait_readable",
]

_EXAMPLE = 'declare it in the manifest, permissions.network = ["api.example.com:443"]'
UNDECLARED: Final = f"this plugin has no network access: {_EXAMPLE}"
LOADING: Final = (
    "a plugin has no network while it loads (import and on_initialize), only once it works for an organisation: use it "
    f"in on_start or later, and {_EXAMPLE}"
)
_GONE = "the host's network broker has ended; the host replaces this worker"
_UNATTACHED = "the host has not given this worker its network yet"

_GREETING_TIMEOUT: Final = 10.0
_MAX_GREETING: Final = 256 << 10
_NOW: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
_NAMES: Final = 8192
# For names: of no host (RFC 2544), so that none is taken for another's, and IPv4, which every library takes.
_FIRST: Final = int(IPv4Address("198.18.0.1"))
_COUNT: Final = (1 << 17) - 2
_MAPPED: Final = bytes(10) + b"\xff\xff"

_encode = msgspec.msgpack.Encoder().encode
_decode_answer = msgspec.msgpack.Decoder(Answer).decode
_decode_greeting = msgspec.msgpack.Decoder(Greeting).decode


class _Link:
    """The descriptor of the broker, and what it said first."""

    def __init__(self, refusal: str, descriptor: int | None = None) -> None:
        self.refusal = refusal
        self.sock = _socket.socket(fileno=descriptor) if descriptor is not None else None
        self._rules: Rules | None = None
        if self.sock:
            self.sock.setblocking(False)

    def rules(self) -> Rules:
        if self._rules is None:
            self._rules = Rules(self._greeting())
        return self._rules

    def _greeting(self) -> bool | list[str]:
        assert self.sock is not None
        if not wait_readable(self.sock.fileno(), _GREETING_TIMEOUT):
            raise OSError(errno.ENETDOWN, _UNATTACHED)
        try:
            # It stays where it is: a fork of this process may not have read it yet.
            greeting = self.sock.recv(_MAX_GREETING, _NOW | socket.MSG_PEEK)
        except OSError:
            greeting = b""
        if not greeting:
            raise OSError(errno.ENETDOWN, _GONE)
        return _decode_greeting(greeting).network


_link = _Link(UNDECLARED)
_lock = threading.Lock()
_names: OrderedDict[str, int] = OrderedDict()
_addresses: dict[int, str] = {}
_next = 0


def refuse(text: str) -> None:
    """Refuse everything from now on, with ``text``."""
    global _link
    _link = _Link(text)


def use(descriptor: int | None) -> None:
    """Ask the broker behind ``descriptor`` from now on; ``None`` if the manifest asks for no network."""
    global _link
    _link = _Link("", descriptor) if descriptor is not None else _Link(UNDECLARED)


def forked() -> None:
    """Begin anew in a child: a thread of the parent's may have held the lock."""
    global _lock
    _lock = threading.Lock()


def wait_readable(descriptor: int, seconds: float | None) -> bool:
    """Wait until there is something to read, or the end."""
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def check(host: str, port: int) -> str:
    """``host`` in its one spelling. ``port`` 0 stands for any.

    Raises ``PermissionError`` if it is not permitted, ``gaierror`` if it is neither a name nor an address, and
    ``OSError`` without a broker.
    """
    if _link.refusal:
        raise PermissionError(errno.EPERM, _link.refusal)
    if literal(host) is None:
        try:
            host = normalise(host if host.isascii() else host.encode("idna").decode())
        except ValueError as error:
            text = error if not isinstance(error, UnicodeError) else "not a DNS name"
            raise socket.gaierror(socket.EAI_NONAME, f"{host!r} is {text}") from None
    if not _link.rules().allow(host, port):
        if literal(host) is not None:
            raise PermissionError(
                errno.EPERM, f"{host} is an address; permissions.network permits names, so connect to a name"
            )
        what = f"{host}:{port}" if port else host
        raise PermissionError(
            errno.EPERM, f'{what} is not in permissions.network; add "{host}:{port or 443}" in the plugin\'s manifest'
        )
    return host


def address_of(name: str) -> str:
    """The address that stands for ``name`` in this process."""
    global _next
    with _lock:
        number = _names.get(name)
        if number is None:
            number = _next
            _next = (_next + 1) % _COUNT
            _names[name] = number
            _addresses[number] = name
            if len(_names) > _NAMES:
                _, oldest = _names.popitem(last=False)
                del _addresses[oldest]
        else:
            _names.move_to_end(name)
    return str(IPv4Address(_FIRST + number))


def name_of(address: str) -> str | None:
    """The name that ``address`` stands for, if it does."""
    packed = literal(address)
    if packed is None:
        return None
    if len(packed) == 16 and packed.startswith(_MAPPED):
        packed = packed[12:]
    return _addresses.get(int.from_bytes(packed, "big") - _FIRST) if len(packed) == 4 else None


def target(host: str, port: int) -> str:
    """The name or address that connecting to ``host`` means. Raises as ``check``."""
    return check(name_of(host) or host or "0.0.0.0", port)


def dial(host: str, port: int) -> int:
    """Ask for a connection: a new descriptor that ``answer`` is to be called for once it can be written to.

    Raises ``OSError`` if the broker cannot be asked.
    """
    if _link.sock is None:
        raise PermissionError(errno.EPERM, _link.refusal)
    ours, theirs = _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        try:
            while True:  # full, it cannot be written to, like a socket that connects
                ours.send(bytes(4096))
        except BlockingIOError:
            pass
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, theirs.fileno().to_bytes(4, "little"))
        try:
            _link.sock.sendmsg([_encode(Dial(host, port))], [rights], _NOW)
        except BlockingIOError:
            raise OSError(errno.ENOBUFS, "too many connections are being made") from None
        except (BrokenPipeError, ConnectionError):
            raise OSError(errno.ENETDOWN, _GONE) from None
        return ours.detach()
    finally:
        ours.close()
        theirs.close()


def answer(descriptor: int) -> tuple[_socket.socket, int] | OSError | None:
    """What came of a dial: the connection and its number, or the error; ``None`` if there is no answer yet."""
    if not wait_readable(descriptor, 0):
        return None
    sock = _socket.socket(fileno=os.dup(descriptor))
    try:
        data, ancillary, _, _ = sock.recvmsg(4096, socket.CMSG_LEN(4), _NOW | socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None
    except OSError:
        data, ancillary = b"", []
    finally:
        sock.close()
    if not data:
        return OSError(errno.ENETDOWN, _GONE)
    said = _decode_answer(data)
    if said.error < 0:
        return socket.gaierror(said.error, said.text)
    if said.error == errno.EPERM:
        return PermissionError(said.error, said.text)
    if said.error:
        return OSError(said.error, said.text)
    if not ancillary:
        return OSError(errno.EMFILE, os.strerror(errno.EMFILE))  # this process has too many descriptors open
    return _socket.socket(fileno=int.from_bytes(ancillary[0][2][:4], "little")), said.number


def done(number: int, sent: int, received: int) -> None:
    """Tell the broker of the end of a connection. A figure that cannot be sent now is lost."""
    if _link.sock is not None:
        try:
            _link.sock.sendmsg([_encode(Done(number, sent, received))], [], _NOW)
        except OSError:
            pass
