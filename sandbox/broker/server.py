"""The broker's process: workers' datagrams in, connected descriptors out, records to the front.

It runs no plugin code and trusts no byte of a worker. Sockets that a worker has, or may have, a copy of are never
waited for: who holds a copy can make it a blocking one.
"""

import asyncio
import contextlib
import ctypes
import encodings.idna  # noqa: F401  getaddrinfo imports it, which may be impossible once the uid is dropped
import errno
import os
import resource
import select
import signal
import socket
import sys
import time
from collections import OrderedDict
from typing import Any, Final, NoReturn

import msgspec

from .. import wire
from .addresses import Policy
from .dialler import DialError, Dialler
from .limits import TUNNELS_PER_ORG, Org, Orgs, TokenBucket
from .messages import (
    MAX_DATAGRAM,
    Answer,
    Attach,
    Closed,
    Configure,
    Connected,
    Dial,
    Done,
    Dropped,
    FromWorker,
    Gone,
    Greeting,
    Refused,
    ToBroker,
)
from .names import Rules, literal, normalise
from .proxy import Endpoint, Proxy
from .resolver import Resolver

__all__ = ["main"]

PENDING_PER_WORKER: Final = 32
"""Dials of one worker at once. Its further datagrams stay in its own socket until one of these is answered."""

_PENDING: Final = 1024  # of all; each holds two descriptors
_TUNNELS: Final = 2048  # of all, each with two descriptors as well
_OPEN: Final = 1024  # connections of a worker whose end it may still report
_DATAGRAMS: Final = (200.0, 400)  # per second and at once, per worker: every dial has two, and retries are few
_TURN: Final = 8  # datagrams of one worker per turn of the loop
_PAUSE: Final = 0.05
_BACKLOG: Final = 4 << 20
_FILES: Final = 8192
_ONE_DESCRIPTOR: Final = socket.CMSG_LEN(4)  # CMSG_SPACE would have room for two
_NOW: Final = socket.MSG_DONTWAIT

_BY_HAND = """\
This is the egress broker of hayhost, the process that connects plugins to the internet. It speaks a private protocol
(version {version}) on a socket that `hayhost` hands it and is of no use by itself.
To serve plugins: hayhost serve PLUGINS_DIR        To develop one: hayhost dev PLUGINS_DIR
"""

_decode = msgspec.msgpack.Decoder(FromWorker).decode
_encode = msgspec.msgpack.Encoder().encode


class _Front:
    """The socket to the front. Frames that it does not take in time are counted instead of kept."""

    def __init__(self, sock: socket.socket, loop: asyncio.AbstractEventLoop) -> None:
        self._sock = sock
        self._loop = loop
        self._out = bytearray()
        self._dropped = 0
        self._scheduled = False

    def send(self, message: wire.Message) -> None:
        if len(self._out) > _BACKLOG:
            self._dropped += 1
            return
        if self._dropped:
            self._out += wire.encode(Dropped(self._dropped))
            self._dropped = 0
        self._out += wire.encode(message)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        try:
            del self._out[: self._sock.send(self._out, _NOW)]
        except BlockingIOError:
            pass
        except OSError:
            self._out.clear()  # it is gone: the next read says so
        if self._out:
            self._loop.add_writer(self._sock, self._flush)
        else:
            self._scheduled = False
            self._loop.remove_writer(self._sock)


class _Broker:
    def __init__(self, control: socket.socket) -> None:
        self.loop = asyncio.get_running_loop()
        self.front = _Front(control, self.loop)
        self.orgs = Orgs()
        self.pending = 0
        self.tunnels = 0
        self.ended: asyncio.Future[None] = self.loop.create_future()
        self.dialler: Dialler | None = None
        self._control = control
        self._decoder: wire.Decoder[Any] = wire.Decoder(ToBroker)
        self._descriptors: list[int] = []
        self._hangups = select.epoll()
        self._dials: dict[int, asyncio.Task[None]] = {}
        self._workers: set[_Worker] = set()
        self.loop.add_reader(self._hangups.fileno(), self._hung_up)
        self.loop.add_reader(control, self._read)

    def _read(self) -> None:
        try:
            data, ancillary, _, _ = self._control.recvmsg(
                1 << 16, socket.CMSG_SPACE(4 * 64), _NOW | socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        self._descriptors += _descriptors(ancillary)
        try:
            for message in self._decoder.feed(data):
                self._obey(message)
        except Exception as error:  # of the front's: nothing that comes after it would make sense
            self.ended.set_exception(error)
        if not data and not self.ended.done():
            self.ended.set_result(None)

    def _obey(self, message: Any) -> None:
        if isinstance(message, Configure):
            os.environ["LOCALDOMAIN"] = "."  # instead of the system's search domains: they would make it another name
            self.dialler = Dialler(Resolver(message.nameserver), Policy(message.allow))
            _confine(message.uid, message.gid)
            self.front.send(wire.Hello(wire.VERSION, []))
        else:
            sock = socket.socket(fileno=self._descriptors.pop(0))
            keeper = socket.socket(fileno=self._descriptors.pop(0)) if message.secret else None
            _Worker(self, message, sock, keeper)

    def remember(self, worker: "_Worker") -> None:
        self._workers.add(worker)

    def forget(self, worker: "_Worker") -> None:
        self._workers.discard(worker)

    def watch(self, reply: socket.socket, task: asyncio.Task[None]) -> None:
        """Cancel ``task`` when the worker closes its end. What it writes meanwhile is not looked at."""
        self._hangups.register(reply.fileno(), select.EPOLLRDHUP)
        self._dials[reply.fileno()] = task

    def unwatch(self, reply: socket.socket) -> None:
        self._hangups.unregister(reply.fileno())  # closing does not, if the worker has kept a copy
        del self._dials[reply.fileno()]

    def _hung_up(self) -> None:
        for descriptor, _ in self._hangups.poll(0):
            if descriptor in self._dials:
                self._dials[descriptor].cancel()


class _Worker:
    """One worker's descriptor. Whatever comes in on it was said by that worker, for that org."""

    def __init__(
        self, broker: _Broker, attach: Attach, sock: socket.socket, keeper: socket.socket | None = None
    ) -> None:
        self._broker = broker
        self._id = attach.id
        self._sock = sock
        self._rules = Rules(attach.network)
        self._org: Org = broker.orgs.enter(attach.org)
        broker.remember(self)
        self._datagrams = TokenBucket(*_DATAGRAMS)
        self._dials: set[asyncio.Task[None]] = set()
        self._open: OrderedDict[int, tuple[str, int]] = OrderedDict()
        self._numbers = 0
        self._closed = False
        self._reading = False
        self._proxy: Proxy | None = None
        if keeper is not None:
            try:
                self._proxy = Proxy(keeper, attach.secret, self)
            except OSError:
                keeper.close()
                self.close("its own network has ended")
                return
        with contextlib.suppress(OSError):
            sock.send(_encode(Greeting(attach.network)), _NOW)
        self._resume()

    def _resume(self) -> None:
        if not self._reading and not self._closed:
            self._reading = True
            self._broker.loop.add_reader(self._sock, self._read)

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._broker.loop.remove_reader(self._sock)

    def _read(self) -> None:
        for _ in range(_TURN):
            if self._closed:
                return
            if len(self._dials) >= PENDING_PER_WORKER:
                self._pause()  # goes on when a dial ends
                return
            if not self._datagrams.take():
                self._pause()
                self._broker.loop.call_later(_PAUSE, self._resume)
                return
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    MAX_DATAGRAM, _ONE_DESCRIPTOR, _NOW | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it is gone and has left the greeting unread; what it said before is still there
            except OSError:
                self.close("")
                return
            self._receive(data, _descriptors(ancillary), flags)

    def _receive(self, data: bytes, descriptors: list[int], flags: int) -> None:
        try:
            if not data and not descriptors:
                return self.close("")
            if flags & socket.MSG_TRUNC:
                return self.close("it sent a datagram that is too long")
            try:
                message = _decode(data)
            except (msgspec.MsgspecError, ValueError, RecursionError):
                return self.close("it sent a malformed datagram")
            if isinstance(message, Done):
                return self._done(message)
            if not descriptors:
                if flags & socket.MSG_CTRUNC:
                    return None  # there was none free: the kernel has closed it, which tells the worker
                return self.close("it sent no socket for the answer")
            try:
                reply = socket.socket(fileno=descriptors[0])
            except OSError:
                return self.close("it sent something else than a socket")
            descriptors.clear()
            if reply.family != socket.AF_UNIX or reply.type != socket.SOCK_STREAM:
                reply.close()
                return self.close("it sent a socket of the wrong kind")
            self._begin(message, reply)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _done(self, message: Done) -> None:
        if opened := self._open.pop(message.number, None):
            self._broker.front.send(Closed(self._id, *opened, message.sent, message.received))

    def _begin(self, message: Dial, reply: socket.socket) -> None:
        try:
            host = self._judge(message.host, message.port)
        except DialError as error:
            self._refuse(message.host, message.port, error, reply)
            reply.close()
            return
        task = self._broker.loop.create_task(self._dial(host, message.port, reply))
        self._dials.add(task)
        self._pend(1)
        self._broker.watch(reply, task)
        task.add_done_callback(lambda task: self._ended(task, reply))

    def _ended(self, task: asyncio.Task[None], reply: socket.socket) -> None:
        self._broker.unwatch(reply)
        reply.close()
        self._dials.discard(task)
        self._pend(-1)
        self._resume()
        if not task.cancelled():
            task.result()

    def _pend(self, more: int) -> None:
        self._broker.pending += more
        self._org.pending += more

    def _judge(self, host: str, port: int) -> str:
        if literal(host) is not None:
            host = host.lower()
        else:
            try:
                host = normalise(host)
            except ValueError as error:
                raise DialError(socket.EAI_NONAME, f"{host!r} is {error}", policy=True) from None
        if not self._rules.allow(host, port):
            raise DialError(errno.EPERM, f"{host}:{port} is not in permissions.network", policy=True)
        if problem := self._org.refusal(self._broker.pending >= _PENDING):
            raise DialError(errno.ENOBUFS, problem, policy=True)  # EAGAIN would mean that it goes on
        return host

    async def _dial(self, host: str, port: int, reply: socket.socket) -> None:
        begun = time.monotonic()
        try:
            sock, address = await self._reach(host, port)
        except DialError as error:
            self._refuse(host, port, error, reply)
            return
        with sock:
            self._numbers += 1
            taken = _answer(reply, Answer(0, "", self._numbers), sock)
        if self._proxy is None:
            if not taken:
                return
            self._open[self._numbers] = host, port
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)
        self._connected(host, port, address, begun)

    async def _reach(self, host: str, port: int) -> tuple[socket.socket, str]:
        """A socket for the worker itself, and the address that it leads to. Raises ``DialError``."""
        assert self._broker.dialler is not None
        if self._proxy is None:
            return await self._broker.dialler.dial(host, port, self._org.resolving)
        self._check_tunnels()
        sock, address = await self._broker.dialler.dial(host, port, self._org.resolving)
        try:
            theirs, ours = await self._proxy.pair()
        except OSError as error:
            sock.close()
            raise DialError(error.errno or errno.ENETDOWN, error.strerror or "the plugin's network has ended") from None
        except BaseException:
            sock.close()
            raise
        self._tunnel(1)
        self._proxy.pass_on(ours, sock, (host, port))
        return theirs, address

    def _connected(self, host: str, port: int, address: str, begun: float) -> None:
        ms = round((time.monotonic() - begun) * 1000, 1)
        self._broker.front.send(Connected(self._id, host, port, address, ms))

    def _refuse(self, host: str, port: int, error: DialError, reply: socket.socket) -> None:
        _answer(reply, Answer(error.number, error.text, 0))
        self.refused(host, port, error)

    # ---- for its programs: proxy.Owner

    async def connect(self, host: str, port: int) -> tuple[socket.socket, Endpoint]:
        assert self._broker.dialler is not None
        begun = time.monotonic()
        try:
            host = self._judge(host, port)
            self._check_tunnels()
            self._pend(1)
            try:
                sock, address = await self._broker.dialler.dial(host, port, self._org.resolving)
            finally:
                self._pend(-1)
        except DialError as error:
            self.refused(host, port, error)
            raise
        self._tunnel(1)
        self._connected(host, port, address, begun)
        return sock, (host, port)

    def _check_tunnels(self) -> None:
        if self._org.tunnels >= TUNNELS_PER_ORG or self._broker.tunnels >= _TUNNELS:
            raise DialError(errno.ENOBUFS, "too many connections are open", policy=True)

    def _tunnel(self, more: int) -> None:
        self._broker.tunnels += more
        self._org.tunnels += more

    def refused(self, host: str, port: int, error: DialError) -> None:
        self._broker.front.send(Refused(self._id, host, port, error.text, error.policy))

    def closed(self, end: Endpoint, sent: int, received: int) -> None:
        self._tunnel(-1)
        self._broker.front.send(Closed(self._id, *end, sent, received, True))

    # ---- its end

    def close(self, reason: str) -> None:
        """Forget the worker. Connections that it was passed are its own; those of its programs end."""
        if self._closed:
            return
        self._pause()
        self._closed = True
        self._sock.close()
        self._broker.orgs.leave(self._org)
        self._broker.forget(self)
        for task in self._dials:
            task.cancel()
        if self._proxy is None:
            self._broker.front.send(Gone(self._id, reason))
        else:  # what has gone through those connections is said before
            self._proxy.close(lambda: self._broker.front.send(Gone(self._id, reason)))


def _answer(reply: socket.socket, answer: Answer, sock: socket.socket | None = None) -> bool:
    """Answer a dial, if the worker still wants it."""
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, sock.fileno().to_bytes(4, sys.byteorder))] if sock else []
    try:
        reply.sendmsg([_encode(answer)], ancillary, _NOW)
        # The worker has filled its end, so that it cannot be written to; that it now can is what it waits for.
        for _ in range(4):
            reply.recv(1 << 16, _NOW)
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


def _descriptors(ancillary: list[tuple[int, int, bytes]]) -> list[int]:
    found: list[int] = []
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            content = content[: len(content) // 4 * 4]
            found += memoryview(content).cast("i").tolist()
    return found


def _confine(uid: int, gid: int) -> None:
    """Give up what is not needed to connect."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    files = _FILES if most == resource.RLIM_INFINITY else min(most, _FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if uid >= 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((38, 1), (4, 0)):  # PR_SET_NO_NEW_PRIVS, PR_SET_DUMPABLE
        if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


async def _run(control: socket.socket) -> None:
    await _Broker(control).ended


def main() -> NoReturn:
    """Entry point of the exec'd process: ``python -I -m sandbox.broker FD``."""
    try:
        [descriptor] = sys.argv[1:]
        control = socket.socket(fileno=int(descriptor))
    except (ValueError, OverflowError, OSError):
        sys.stderr.write(_BY_HAND.format(version=wire.VERSION))
        sys.exit(64)
    control.set_inheritable(False)
    control.setblocking(False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        asyncio.run(_run(control))
    except (ValueError, OSError, ImportError, wire.ProtocolError) as error:
        sys.stderr.write(f"the egress broker ends: {error}\n")
        os._exit(1)
    os._exit(0)  # a thread that still resolves a name is not waited for
