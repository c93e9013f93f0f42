"""Python's sockets for a process that may not open any: the egress broker connects instead.

``socket.socket`` keeps its class and gets other methods, so that whoever imported it before gets them as well. A socket
has a placeholder for a descriptor until it is connected: one end of a pair, the only kind that may be made. Names get
addresses of their own at ``getaddrinfo``, which ``connect`` turns back, so that what is asked for is always a name.
"""

import _socket
import contextlib
import errno
import os
import selectors
import socket
import struct
import threading
import weakref
from collections.abc import Callable
from typing import Any, Final

from . import dialling, foreign
from .broker.names import literal
from .dialling import LOADING, UNDECLARED

__all__ = ["LOADING", "UNDECLARED", "install", "use"]

_C: Final[Any] = _socket.socket
_FLAGS: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_STREAM: Final = int(socket.SOCK_STREAM)
_FAMILIES: Final = (int(socket.AF_INET), int(socket.AF_INET6))
_WILDCARD: Final = ("", "0.0.0.0", "::")
_TCP_INFO: Final = struct.Struct(
    "=B 127x Q 8x I 52x Q Q"
)  # state, bytes_received, notsent_bytes, bytes_sent, bytes_retrans
_PEER_ENDED: Final = (6, 8, 9, 11)  # TIME_WAIT, CLOSE_WAIT, LAST_ACK, CLOSING: the end counts as a byte received
_LONGEST: Final = 60.0  # a broker that is stuck keeps no thread for ever; the kernel would give up after two minutes
_MOST_OPTIONS: Final = 64
_LISTEN = "a plugin cannot listen for connections; register a route instead"


class _State:
    """What a socket object's descriptor stands for: nothing, a dial, or a connection. Kept by descriptor: ssl moves
    descriptors from one object to another."""

    __slots__ = ("dialling", "error", "identity", "number", "options", "selectors")

    def __init__(self, descriptor: int) -> None:
        self.identity = _identity(descriptor)
        self.dialling = False
        self.number = 0
        self.error: OSError | None = None
        self.options: dict[tuple[int, int], tuple[Any, ...]] = {}
        self.selectors: weakref.WeakSet[selectors.EpollSelector] = weakref.WeakSet()


_states: dict[int, _State] = {}
_lock = threading.RLock()
_original: dict[str, Callable[..., Any]] = {}


def install(refusal: str = LOADING) -> None:
    """Adapt this process and its forks. Until ``use``, every attempt is a ``PermissionError`` that says ``refusal``."""
    dialling.refuse(refusal)
    if _original:
        return
    for name, method in _METHODS.items():
        _original[name] = getattr(socket.socket, name)
        setattr(socket.socket, name, method)
    for name, function in _FUNCTIONS.items():
        setattr(_socket, name, function)
        if name != "getaddrinfo":  # that of socket calls the other one
            setattr(socket, name, function)
    _original["register"] = selectors.EpollSelector.register
    setattr(selectors.EpollSelector, "register", _register)  # noqa: B010  # not for a type checker's eyes
    os.register_at_fork(after_in_child=_forked)
    foreign.install()


def use(descriptor: int | None) -> None:
    """Have the broker behind ``descriptor``, which is taken over, connect; without one everything is refused as not
    declared. Raises ``OSError`` if it is no socket."""
    dialling.use(descriptor)


def _forked() -> None:
    global _lock
    _lock = threading.RLock()
    dialling.forked()
    for descriptor, state in list(_states.items()):
        if state.dialling or state.number:
            del _states[descriptor]  # the parent's


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _state(sock: socket.socket) -> _State | None:
    descriptor = sock.fileno()
    state = _states.get(descriptor)
    if state is None or state.identity == _identity(descriptor):
        return state
    del _states[descriptor]  # closed behind our back, and the number used again
    return None


def _pending(sock: socket.socket) -> _State | None:
    """The state of a socket that is not connected, as far as is known now."""
    state = _state(sock)
    if state is None or state.number:
        return None
    _settle(sock, state)
    return None if state.number else state


def _settle(sock: socket.socket, state: _State) -> None:
    """Take in the broker's answer, if there is one."""
    with _lock:
        if not state.dialling or (answer := dialling.answer(sock.fileno())) is None:
            return
        state.dialling = False
        if isinstance(answer, OSError):
            state.error = answer
            return
        connection, state.number = answer
        for (level, name), value in state.options.items():
            with contextlib.suppress(OSError):
                connection.setsockopt(level, name, *value)
        family = connection.family
        _become(sock, state, connection.detach())
        if family != sock.family:  # by which addresses are read
            timeout = sock.gettimeout()
            _C.__init__(sock, family, sock.type, sock.proto, sock.fileno())
            _C.settimeout(sock, timeout)


def _become(sock: socket.socket, state: _State, new: int) -> None:
    """Put ``new`` in the place of the socket's descriptor, which keeps its number, flags and registrations."""
    descriptor = sock.fileno()
    os.set_blocking(new, os.get_blocking(descriptor))
    registered: list[tuple[Any, int]] = []
    for selector in list(state.selectors):
        key = selector.get_map().get(descriptor)
        if key is not None:
            epoll = selector._selector  # type: ignore[attr-defined]
            registered.append((epoll, key.events))
            with contextlib.suppress(OSError):
                epoll.unregister(descriptor)
    os.dup2(new, descriptor, os.get_inheritable(descriptor))
    os.close(new)
    state.identity = _identity(descriptor)
    for epoll, events in registered:
        with contextlib.suppress(OSError):  # EVENT_READ and EPOLLIN are the same number; EVENT_WRITE is EPOLLOUT's half
            epoll.register(descriptor, (events & 1) | (events & 2) << 1)


def _begin(sock: socket.socket, state: _State, address: Any) -> OSError | None:
    """Dial. An error of the kind that the kernel would have given is returned, others are raised."""
    _settle(sock, state)
    if state.number:
        return OSError(errno.EISCONN, os.strerror(errno.EISCONN))
    if state.dialling:
        return OSError(errno.EALREADY, os.strerror(errno.EALREADY))
    if error := _take_error(state):
        return error
    if not isinstance(address, tuple) or len(address) < 2:
        raise TypeError(f"{sock.family.name} address must be tuple, not {type(address).__name__}")
    host, port = _text(address[0]), int(address[1])
    if not 0 <= port <= 65535:
        raise OverflowError("connect(): port must be 0-65535.")
    if not port:
        return OSError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
    name = dialling.target(host, port)
    with _lock:
        _become(sock, state, dialling.dial(name, port))
        state.dialling = True
    timeout = sock.gettimeout()
    if timeout == 0:
        return OSError(errno.EINPROGRESS, os.strerror(errno.EINPROGRESS))
    if not dialling.wait_readable(sock.fileno(), _LONGEST if timeout is None else timeout):
        raise TimeoutError("timed out")
    _settle(sock, state)
    return _take_error(state)


def _take_error(state: _State) -> OSError | None:
    error, state.error = state.error, None
    return error


def _text(host: Any) -> str:
    return bytes(host).decode("ascii", "replace") if isinstance(host, bytes | bytearray) else str(host)


def _name(family: int) -> str:
    try:
        return socket.AddressFamily(family).name
    except ValueError:
        return str(int(family))


# ---- methods of socket.socket


def _init(self: Any, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None) -> None:
    if fileno is not None:
        _original["__init__"](self, family, type, proto, fileno)
        return
    family = socket.AF_INET if family == -1 else family
    type = socket.SOCK_STREAM if type == -1 else type
    proto = max(proto, 0)
    if family not in _FAMILIES:
        raise PermissionError(errno.EPERM, f"a plugin has TCP only, no sockets of family {_name(family)}")
    if type & ~_FLAGS != _STREAM or proto not in (0, socket.IPPROTO_TCP):
        raise PermissionError(errno.EPERM, "a plugin has TCP only: no UDP, no raw and no other sockets")
    ours, theirs = _socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    theirs.close()
    descriptor = ours.detach()
    _original["__init__"](self, family, type, proto, descriptor)
    os.set_blocking(descriptor, self.gettimeout() is None)
    _states[descriptor] = _State(descriptor)


def _connect(self: Any, address: Any) -> None:
    state = _state(self)
    if state is None:
        _original["connect"](self, address)
    elif error := _begin(self, state, address):
        raise error


def _connect_ex(self: Any, address: Any) -> int:
    state = _state(self)
    if state is None:
        return int(_original["connect_ex"](self, address))
    try:
        error = _begin(self, state, address)
    except TimeoutError:
        return errno.EAGAIN
    if isinstance(error, PermissionError | socket.gaierror):
        raise error
    return 0 if error is None else error.errno or errno.EIO


def _setsockopt(self: Any, level: int, name: int, *value: Any) -> None:
    state = _pending(self)
    if state is None:
        _original["setsockopt"](self, level, name, *value)
    elif len(state.options) < _MOST_OPTIONS:
        state.options[level, name] = value


def _getsockopt(self: Any, level: int, name: int, *size: int) -> Any:
    if (state := _state(self)) and (level, name) == (socket.SOL_SOCKET, socket.SO_ERROR):
        _settle(self, state)
        if error := _take_error(state):
            if isinstance(error, PermissionError | socket.gaierror):
                raise error  # the number alone would not say what is to be done
            return error.errno
    elif (state := _pending(self)) and (level != socket.SOL_SOCKET or (level, name) in state.options):
        value = state.options.get((level, name), (0,))[0]
        if not size:
            return int.from_bytes(value, "little") if isinstance(value, bytes) else value
        return (value if isinstance(value, bytes) else int(value or 0).to_bytes(4, "little"))[: size[0]]
    return _original["getsockopt"](self, level, name, *size)


def _getpeername(self: Any) -> Any:
    if _pending(self):
        raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
    return _original["getpeername"](self)


def _getsockname(self: Any) -> Any:
    if _pending(self):
        return ("0.0.0.0", 0) if self.family == socket.AF_INET else ("::", 0, 0, 0)
    return _original["getsockname"](self)


def _bind(self: Any, address: Any) -> None:
    if not _state(self):
        _original["bind"](self, address)
    elif not isinstance(address, tuple) or address[0] not in _WILDCARD or address[1] != 0:
        raise PermissionError(errno.EPERM, f"a plugin cannot bind a socket to an address: {_LISTEN}")


def _listen(self: Any, *backlog: int) -> None:
    raise PermissionError(errno.EPERM, _LISTEN)


def _real_close(self: Any, _ss: Any = _C) -> None:
    if _states:
        state = _state(self) if self.fileno() >= 0 else None
        if state is not None:
            del _states[self.fileno()]
            if state.number:
                _report(self, state.number)
    _original["_real_close"](self)


def _report(sock: socket.socket, number: int) -> None:
    """Say how much went through a connection, as the kernel counted it."""
    try:
        info = _C.getsockopt(sock, socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)
        state, received, unsent, sent, again = _TCP_INFO.unpack(info)
        dialling.done(number, max(0, sent - again) + unsent, max(0, received - (state in _PEER_ENDED)))
    except (OSError, struct.error):
        dialling.done(number, 0, 0)


_METHODS: Final[dict[str, Callable[..., Any]]] = {
    "__init__": _init,
    "connect": _connect,
    "connect_ex": _connect_ex,
    "setsockopt": _setsockopt,
    "getsockopt": _getsockopt,
    "getpeername": _getpeername,
    "getsockname": _getsockname,
    "bind": _bind,
    "listen": _listen,
    "_real_close": _real_close,
}


def _register(self: selectors.EpollSelector, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
    key: selectors.SelectorKey = _original["register"](self, fileobj, events, data)
    state = _states.get(key.fd)
    if state is not None and not state.number:
        state.selectors.add(self)
    return key


# ---- functions of _socket


def _getaddrinfo(
    host: Any, port: Any, family: int = 0, type: int = 0, proto: int = 0, flags: int = 0
) -> list[tuple[int, int, int, str, tuple[Any, ...]]]:
    number = _port(port)
    name = "" if host is None else _text(host)
    if not name:
        passive = flags & socket.AI_PASSIVE
        addresses = ["0.0.0.0", "::"] if passive else ["127.0.0.1", "::1"]
    elif packed := literal(name):
        if not flags & (socket.AI_NUMERICHOST | socket.AI_PASSIVE) and not dialling.name_of(name):
            dialling.check(name, number)
        addresses = [socket.inet_ntop(socket.AF_INET if len(packed) == 4 else socket.AF_INET6, packed)]
    elif flags & socket.AI_NUMERICHOST:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    else:
        name = dialling.check(name, number)
        address = dialling.address_of(name)
        addresses = [f"::ffff:{address}" if family == socket.AF_INET6 else address]
    kinds = [kind for kind in ((socket.SOCK_STREAM, 6), (socket.SOCK_DGRAM, 17)) if type in (0, kind[0])]
    kinds = [kind for kind in kinds if proto in (0, kind[1])] or [(socket.SocketKind(type or 1), proto)]
    canonical = name if flags & socket.AI_CANONNAME else ""
    found: list[tuple[int, int, int, str, tuple[Any, ...]]] = []
    for text in addresses:
        kin = socket.AF_INET6 if ":" in text else socket.AF_INET
        if family in (0, kin):
            place = (text, number, 0, 0) if ":" in text else (text, number)
            found += [(kin, kind, protocol, canonical, place) for kind, protocol in kinds]
    if not found:
        raise socket.gaierror(socket.EAI_ADDRFAMILY, "Address family for hostname not supported")
    return found


def _port(port: Any) -> int:
    if port is None or isinstance(port, int):
        return port or 0
    text = _text(port)
    if text.isdigit():
        return int(text)
    try:
        return _socket.getservbyname(text, "tcp") if text else 0
    except OSError:
        raise socket.gaierror(socket.EAI_SERVICE, "Servname not supported for ai_socktype") from None


def _gethostbyname(host: Any) -> str:
    return str(_getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])


def _gethostbyname_ex(host: Any) -> tuple[str, list[str], list[str]]:
    return _text(host), [], [_gethostbyname(host)]


def _gethostbyaddr(host: Any) -> tuple[str, list[str], list[str]]:
    if name := dialling.name_of(_text(host)):
        return name, [], [_text(host)]
    raise socket.herror(1, "Unknown host")


def _getnameinfo(address: tuple[Any, ...], flags: int) -> tuple[str, str]:
    host = _text(address[0])
    name = None if flags & socket.NI_NUMERICHOST else dialling.name_of(host)
    if name is None and flags & socket.NI_NAMEREQD:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    return name or host, str(address[1])


_FUNCTIONS: Final[dict[str, Callable[..., Any]]] = {
    "getaddrinfo": _getaddrinfo,
    "gethostbyname": _gethostbyname,
    "gethostbyname_ex": _gethostbyname_ex,
    "gethostbyaddr": _gethostbyaddr,
    "getnameinfo": _getnameinfo,
}
