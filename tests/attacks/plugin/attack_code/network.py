"""Network: every family of sockets, and every way to connect, send and listen."""

import asyncio
import contextlib
import ctypes
import errno
import os
import socket
import struct

from . import harness
from .harness import Refused, Victims, attack, scratch

_MPTCP = 262
_AF_RDS, _AF_KCM, _AF_QIPCRTR, _AF_SMC, _AF_XDP, _AF_NFC, _AF_TIPC, _AF_VSOCK, _AF_ALG = (
    21,
    41,
    42,
    43,
    44,
    39,
    30,
    40,
    38,
)
_AF_BLUETOOTH, _AF_CAN, _AF_PPPOX, _AF_RXRPC, _AF_KEY, _AF_MCTP = 31, 29, 24, 33, 15, 45

_S, _D, _R, _Q = socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET
_FAMILIES: dict[str, tuple[int, int, int]] = {
    "inet-stream": (socket.AF_INET, _S, 0),
    "inet-datagram": (socket.AF_INET, _D, 0),
    "inet-raw": (socket.AF_INET, _R, socket.IPPROTO_ICMP),
    "inet-ping": (socket.AF_INET, _D, socket.IPPROTO_ICMP),
    "inet-mptcp": (socket.AF_INET, _S, _MPTCP),
    "inet-udplite": (socket.AF_INET, _D, 136),
    "inet-sctp": (socket.AF_INET, _S, 132),
    "inet-dccp": (socket.AF_INET, 6, 33),
    "inet6-stream": (socket.AF_INET6, _S, 0),
    "inet6-datagram": (socket.AF_INET6, _D, 0),
    "unix-stream": (socket.AF_UNIX, _S, 0),
    "unix-datagram": (socket.AF_UNIX, _D, 0),
    "unix-seqpacket": (socket.AF_UNIX, _Q, 0),
    "netlink-route": (16, _R, 0),
    "netlink-audit": (16, _R, 9),
    "netlink-netfilter": (16, _R, 12),
    "netlink-uevent": (16, _D, 15),
    "netlink-diag": (16, _D, 4),
    "packet": (17, _R, 0x300),
    "vsock": (_AF_VSOCK, _S, 0),
    "alg": (_AF_ALG, _Q, 0),
    "key": (_AF_KEY, _R, 2),
    "rds": (_AF_RDS, _Q, 0),
    "can": (_AF_CAN, _R, 1),
    "bluetooth": (_AF_BLUETOOTH, _R, 1),
    "tipc": (_AF_TIPC, _S, 0),
    "smc": (_AF_SMC, _S, 0),
    "xdp": (_AF_XDP, _R, 0),
    "kcm": (_AF_KCM, _D, 0),
    "nfc": (_AF_NFC, _Q, 0),
    "qipcrtr": (_AF_QIPCRTR, _D, 0),
    "pppox": (_AF_PPPOX, _S, 0),
    "rxrpc": (_AF_RXRPC, _D, 2),
    "mctp": (_AF_MCTP, _D, 0),
}
_PRIVILEGED = {"inet-raw", "packet", "key", "xdp", "netlink-audit", "bluetooth", "nfc", "can"}


def _add_family(name: str, family: int, kind: int, protocol: int) -> None:
    def run(_v: Victims) -> str:
        return harness.probe("socket", family, kind, protocol, reached=())

    about = f"Makes a socket of the kind {name}"
    harness._add(f"socket-{name}", __name__, about, run, success="there is a socket", root=name in _PRIVILEGED)


for _name, _numbers in _FAMILIES.items():
    _add_family(_name, *_numbers)


@attack("Connects to a TCP port of the machine", harm="tcp")
def tcp_connect(v: Victims) -> str:
    return str(socket.create_connection(("127.0.0.1", v.tcp), 5))


@attack("Connects to a TCP port without waiting", harm="tcp")
def tcp_connect_later(v: Victims) -> str:
    sock = socket.socket()
    sock.setblocking(False)
    code = sock.connect_ex(("127.0.0.1", v.tcp))
    if code not in (0, errno.EINPROGRESS):
        raise OSError(code, os.strerror(code))
    sock.setblocking(True)
    return str(sock.send(b"attacked"))


@attack("Connects to a TCP port with multipath TCP, which Landlock does not know", harm="tcp")
def mptcp_connect(v: Victims) -> str:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, _MPTCP)
    sock.settimeout(5)
    sock.connect(("127.0.0.1", v.tcp))
    return str(sock.send(b"attacked"))


@attack("Connects to a TCP port by an IPv6 address that stands for an IPv4 one", harm="tcp")
def tcp_connect_mapped(v: Victims) -> str:
    sock = socket.socket(socket.AF_INET6)
    sock.settimeout(5)
    sock.connect(("::ffff:127.0.0.1", v.tcp))
    return str(sock)


@attack("Connects to a TCP port while it sends, without connect()", harm="tcp")
def tcp_fast_open(v: Victims) -> str:
    sock = socket.socket()
    sock.settimeout(5)
    return str(sock.sendto(b"attacked", socket.MSG_FASTOPEN, ("127.0.0.1", v.tcp)))


@attack("Listens on a TCP port of the machine")
def tcp_listen(v: Victims) -> str:
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen()
    return str(sock)


@attack("Listens on a TCP port that the kernel picks, without bind()")
def tcp_listen_unbound(v: Victims) -> str:
    sock = socket.socket()
    sock.listen()
    return str(sock.getsockname())


@attack("Sends a datagram to a UDP port of the machine", harm="udp")
def udp_send(v: Victims) -> str:
    return str(socket.socket(type=_D).sendto(b"attacked", ("127.0.0.1", v.udp)))


@attack("Sends a datagram on a connected UDP socket", harm="udp")
def udp_connect(v: Victims) -> str:
    sock = socket.socket(type=_D)
    sock.connect(("127.0.0.1", v.udp))
    return str(os.write(sock.fileno(), b"attacked"))


@attack("Sends a datagram with sendmsg", harm="udp")
def udp_sendmsg(v: Victims) -> str:
    return str(socket.socket(type=_D).sendmsg([b"attacked"], [], 0, ("127.0.0.1", v.udp)))


@attack("Receives datagrams on a UDP port of the machine")
def udp_bind(v: Victims) -> str:
    sock = socket.socket(type=_D)
    sock.bind(("127.0.0.1", 0))
    return str(sock)


@attack("Connects to a Unix socket of the machine by its path", harm="unix")
def unix_connect(v: Victims) -> str:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(v.unix)
    return str(sock)


@attack("Connects to a Unix socket of the machine by a link in its scratch folder", harm="unix")
def unix_connect_linked(v: Victims) -> str:
    link = os.path.join(scratch(), "link")
    os.symlink(v.unix, link)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(link)
    return str(sock)


@attack("Connects to an abstract Unix socket of the machine", harm="abstract")
def abstract_connect(v: Victims) -> str:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect("\0" + v.abstract)
    return str(sock)


@attack("Sends a datagram to a Unix socket of the machine by its path", harm="unix_datagram")
def unix_send(v: Victims) -> str:
    return str(socket.socket(socket.AF_UNIX, _D).sendto(b"attacked", v.unix_datagram))


@attack("Sends a datagram to an abstract Unix socket of the machine", harm="abstract_datagram")
def abstract_send(v: Victims) -> str:
    return str(socket.socket(socket.AF_UNIX, _D).sendto(b"attacked", "\0" + v.abstract_datagram))


@attack("Sends to a Unix socket by its path from one of a pair, without socket()", harm="unix_datagram")
def pair_send(v: Victims) -> str:
    one, _other = socket.socketpair(socket.AF_UNIX, _D)
    return str(one.sendto(b"attacked", v.unix_datagram))


@attack("Sends to an abstract Unix socket from one of a pair, without socket()", harm="abstract_datagram")
def pair_send_abstract(v: Victims) -> str:
    one, _other = socket.socketpair(socket.AF_UNIX, _D)
    return str(one.sendmsg([b"attacked"], [], 0, "\0" + v.abstract_datagram))


@attack("Connects one of a pair of datagram sockets to a Unix socket of the machine", harm="unix_datagram")
def pair_connect(v: Victims) -> str:
    one, _other = socket.socketpair(socket.AF_UNIX, _D)
    one.connect(v.unix_datagram)
    return str(os.write(one.fileno(), b"attacked"))


@attack("Gives one of a pair of sockets a name that others can connect to")
def pair_bind(v: Victims) -> str:
    one, _other = socket.socketpair(socket.AF_UNIX, _D)
    one.bind(f"\0hayattack-{v.token}")
    return str(one.getsockname())


@attack("Receives on a Unix socket in its scratch folder")
def unix_listen(v: Victims) -> str:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(os.path.join(scratch(), "s"))
    sock.listen()
    return str(sock)


@attack("Gives its own link to the host a name of its own")
def link_bind(v: Victims) -> str:
    sock = socket.socket(fileno=os.dup(find_link()))
    sock.bind(f"\0hayattack-link-{v.token}")
    return str(sock.getsockname())


@attack("Asks the host's end of its own link who is there")
def link_credentials(v: Victims) -> str:
    sock = socket.socket(fileno=os.dup(find_link()))
    pid, uid, gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if pid != v.host_pid:
        raise Refused(f"it says {pid}")
    return f"{pid} {uid} {gid}"


@attack("Takes a pidfd of the host from its own link")
def link_peer_pidfd(v: Victims) -> str:
    sock = socket.socket(fileno=os.dup(find_link()))
    return str(sock.getsockopt(socket.SOL_SOCKET, 77))  # SO_PEERPIDFD


@attack("Lists the network interfaces of the machine")
def list_interfaces(v: Victims) -> str:
    return str(socket.if_nameindex())


@attack("Has the kernel's cryptography work for it", root=False)
def crypto_bind(v: Victims) -> str:
    sock = socket.socket(_AF_ALG, _Q)
    sock.bind(("hash", "sha1"))
    return str(sock)


@attack("Sends a packet to itself past the protocols", root=True)
def packet_send(v: Victims) -> str:
    sock = socket.socket(17, _R, 0x300)
    return str(sock.sendto(bytes(14) + b"attacked", ("lo", 0)))


@attack("Gives a socket a program that the kernel compiles and runs on what arrives")
def filter_socket(v: Victims) -> str:
    one, _other = socket.socketpair()
    code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFF))
    one.setsockopt(socket.SOL_SOCKET, 26, struct.pack("HxxxxxxP", 1, ctypes.addressof(code)))  # SO_ATTACH_FILTER
    return "attached"


def find_link() -> int:
    """The worker's socket to the host: a connected Unix stream that is not the event loop's own pair."""
    loop = asyncio.get_running_loop()
    own = {getattr(loop, name).fileno() for name in ("_ssock", "_csock") if hasattr(loop, name)}
    for descriptor in range(3, 1024):
        if descriptor in own:
            continue
        try:
            duplicate = os.dup(descriptor)
        except OSError:
            continue
        try:
            with socket.socket(fileno=duplicate) as sock:
                if sock.family == socket.AF_UNIX and sock.type == _S and sock.getpeername() == "":
                    return descriptor
        except OSError:
            with contextlib.suppress(OSError):
                os.close(duplicate)
    raise Refused("no socket to the host")
