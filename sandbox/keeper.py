"""The keeper: the first process in the namespaces of a loaded plugin. Trusted code only; it runs none of the plugin's.

Whatever loses its parent in there becomes its child, and all of them end with it. It makes the workers' scratch
folders, as nobody else in there may mount anything, and the sockets of its network for the egress broker, which is
outside. It leaves when the last process that it keeps has gone, or when the front lets go of it: then
nothing that a plugin has left behind is of use to anybody.
"""

import os
import select
import socket
from typing import NoReturn

from . import processes, wire
from .confinement import Plan, namespaces, privileges
from .confinement.descriptors import close_all_but

__all__ = ["split", "tcp_pair"]

_CAP_SYS_ADMIN = 1 << 21
_BACKLOG = 64
_PAIRS = 16  # at once
_PAIR_TIMEOUT = 1.0  # a plugin that is being loaded could keep others from connecting


def split(plan: Plan, control: int, keeper: int) -> None:
    """Move into new namespaces. Returns in the process that is to be the zygote; the one that called is gone.

    Raises ``OSError`` if there can be no namespaces, in the process that is to say so on ``control``.
    """
    namespaces.unshare()
    if plan.proxied:
        namespaces.raise_loopback()
    if os.fork():
        os._exit(0)  # what counts is the child, the first in its process tree; the nursery takes it over
    os.setsid()
    namespaces.enter(plan.trees, plan.writable)
    owner = (os.geteuid(), os.getegid()) if plan.uid is None else (plan.uid, plan.uid)
    scratches = namespaces.Scratches(plan.scratch_size, *owner)
    if os.fork():
        os.close(control)
        _keep(socket.socket(fileno=keeper), scratches)
    os.setsid()


def _keep(sock: socket.socket, scratches: namespaces.Scratches) -> NoReturn:
    processes.set_name("hay-keeper")
    close_all_but({sock.fileno(), scratches.folder})
    wake = processes.wake_on_child()
    privileges.drop_capabilities(_CAP_SYS_ADMIN)
    privileges.forbid_new()
    decoder: wire.Decoder[wire.ToKeeper] = wire.Decoder(wire.ToKeeper)
    descriptors: list[int] = []
    brokers: dict[int, socket.socket] = {}
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    poll.register(wake, select.POLLIN)
    _send(sock, wire.Hello(wire.VERSION, []))
    while processes.has_children():
        for descriptor, _ in poll.poll():
            if descriptor == wake:
                os.read(wake, 4096)
                for pid, status in processes.reap():
                    _send(sock, wire.ChildExited(pid, status))
                continue
            if descriptor in brokers:
                if not _give_pairs(brokers[descriptor]):
                    poll.unregister(descriptor)
                    brokers.pop(descriptor).close()
                continue
            data = processes.receive(sock, 1 << 16, descriptors)
            if not data:
                os._exit(0)
            for message in decoder.feed(data):
                if isinstance(message, wire.MakeScratch):
                    error = _made(scratches, message.name)
                    if message.port:
                        broker = socket.socket(fileno=descriptors.pop(0))
                        error = error or _listen(message.port, broker)
                        brokers[broker.fileno()] = broker
                        poll.register(broker, select.POLLIN)
                    _send(sock, wire.ScratchMade(message.name, error))
                else:
                    scratches.drop(message.name)
    os._exit(0)


def _made(scratches: namespaces.Scratches, name: str) -> str:
    try:
        scratches.make(name)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _listen(port: int, broker: socket.socket) -> str:
    """Give away a socket that listens on ``port``; why there is none, or empty."""
    try:
        with socket.socket() as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # past connections of the port do not matter
            listener.bind(("127.0.0.1", port))
            listener.listen(_BACKLOG)
            socket.send_fds(broker, [b"\0"], [listener.fileno()])
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _give_pairs(broker: socket.socket) -> bool:
    """Give away a pair for each byte that has come; whether there may be more."""
    try:
        wanted = len(broker.recv(_PAIRS, socket.MSG_DONTWAIT))
        for _ in range(wanted):
            ours, theirs = tcp_pair()
            with ours, theirs:
                socket.send_fds(broker, [b"\0"], [ours.fileno(), theirs.fileno()], socket.MSG_DONTWAIT)
    except OSError:
        return False
    return wanted > 0


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Two TCP sockets of this network that are connected to each other. Raises ``OSError``."""
    with socket.socket() as listener:
        listener.settimeout(_PAIR_TIMEOUT)
        listener.bind(("127.0.0.1", 0))
        listener.listen(_BACKLOG)
        one = socket.socket()
        try:
            one.settimeout(_PAIR_TIMEOUT)
            one.connect(listener.getsockname())
            while True:
                other, peer = listener.accept()
                if peer == one.getsockname():
                    return one, other
                other.close()
        except BaseException:
            one.close()
            raise


def _send(sock: socket.socket, message: wire.Message) -> None:
    try:
        sock.sendall(wire.encode(message))
    except (BrokenPipeError, ConnectionResetError):
        pass  # nobody asks any more
