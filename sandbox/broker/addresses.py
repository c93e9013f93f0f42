"""Which addresses nothing is connected to, whatever name led to them: everything that is not the public internet.

An explicit list: ``ipaddress.is_global`` lets NAT64 and others through, and differs between Python versions. Whatever
carries an IPv4 address inside an IPv6 one is refused as such, so that no spelling of a refused address is left.
"""

import contextlib
import re
import socket
from collections.abc import Iterable
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from pathlib import Path
from typing import Final

__all__ = ["Policy"]

_Network = IPv4Network | IPv6Network

_SPECIAL: Final[list[tuple[_Network, str]]] = [
    (ip_network(network), what)
    for network, what in (
        ("0.0.0.0/8", "an unspecified address"),
        ("10.0.0.0/8", "a private address"),
        ("100.64.0.0/10", "a shared address (carrier NAT)"),
        ("127.0.0.0/8", "a loopback address"),
        ("168.63.129.16/32", "a cloud platform's own address"),
        ("169.254.0.0/16", "a link-local address"),
        ("172.16.0.0/12", "a private address"),
        ("192.0.0.0/24", "a protocol's address"),
        ("192.0.2.0/24", "a documentation address"),
        ("192.31.196.0/24", "a protocol's address"),
        ("192.52.193.0/24", "a protocol's address"),
        ("192.88.99.0/24", "a 6to4 relay"),
        ("192.168.0.0/16", "a private address"),
        ("192.175.48.0/24", "a protocol's address"),
        ("198.18.0.0/15", "a benchmarking address"),
        ("198.51.100.0/24", "a documentation address"),
        ("203.0.113.0/24", "a documentation address"),
        ("224.0.0.0/4", "a multicast address"),
        ("255.255.255.255/32", "the broadcast address"),
        ("240.0.0.0/4", "a reserved address"),
        ("::/128", "an unspecified address"),
        ("::1/128", "a loopback address"),
        ("::ffff:0:0/96", "an IPv4-mapped address"),
        ("::ffff:0:0:0/96", "an IPv4-translated address"),
        ("::/96", "an IPv4-compatible address"),
        ("64:ff9b::/96", "a NAT64 address"),
        ("64:ff9b:1::/48", "a NAT64 address"),
        ("100::/64", "a discard address"),
        ("2001::/32", "a Teredo address"),
        ("2001:2::/48", "a benchmarking address"),
        ("2001::/23", "a protocol's address"),
        ("2001:db8::/32", "a documentation address"),
        ("2002::/16", "a 6to4 address"),
        ("2620:4f:8000::/48", "a protocol's address"),
        ("3ffe::/16", "a retired address"),
        ("3fff::/20", "a documentation address"),
        ("5f00::/16", "a segment-routing address"),
        ("fc00::/7", "a private address"),
        ("fe80::/10", "a link-local address"),
        ("fec0::/10", "a site-local address"),
        ("ff00::/8", "a multicast address"),
    )
]
_UNICAST: Final = IPv6Network("2000::/3")
_NAT64: Final = IPv6Network("64:ff9b::/96")
# ISATAP: an IPv4 address behind this identifier, under any prefix. The second and third bits vary.
_ISATAP: Final = (b"\0\0\x5e\xfe", b"\x02\0\x5e\xfe", b"\x01\0\x5e\xfe", b"\x03\0\x5e\xfe")

_HOST_LOCAL = re.compile(r"\|-- ([0-9.]+)\n\s+/32 host LOCAL")


class Policy:
    """Judges addresses. ``allow`` are networks that the operator lets plugins reach all the same.

    Raises ``ValueError`` if one of them is not a network.
    """

    def __init__(self, allow: Iterable[str] = ()) -> None:
        self._allowed: list[_Network] = [ip_network(network) for network in allow]

    def allows(self, packed: bytes) -> bool:
        """Whether the operator lets plugins reach it, whatever it is."""
        address = ip_address(packed)
        return any(address in network for network in self._allowed)

    def refusal(self, packed: bytes) -> str | None:
        """What the address is that makes it refused; ``None`` if it may be connected to."""
        address = ip_address(packed)
        if self.allows(packed):
            if isinstance(address, IPv6Address) and address in _NAT64:
                return self.refusal(packed[12:])
            return None
        for network, what in _SPECIAL:
            if address in network:
                return what
        if isinstance(address, IPv6Address):
            if address not in _UNICAST:
                return "a reserved address"
            if packed[8:12] in _ISATAP:
                return "an ISATAP address"
        return "an address of this host" if _is_own(address) else None


def _is_own(address: IPv4Address | IPv6Address) -> bool:
    """Whether it is this machine's. Only such an address can be bound to, unless the system lets any."""
    v4 = isinstance(address, IPv4Address)
    if _binds_any(v4):
        return str(address) in _own()
    with socket.socket(socket.AF_INET if v4 else socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError:
            return False
    return True


def _binds_any(v4: bool) -> bool:
    try:
        return Path(f"/proc/sys/net/{'ipv4' if v4 else 'ipv6'}/ip_nonlocal_bind").read_text().strip() != "0"
    except OSError:
        return False


def _own() -> set[str]:
    own: set[str] = set()
    with contextlib.suppress(OSError):
        own.update(_HOST_LOCAL.findall(Path("/proc/net/fib_trie").read_text()))
    with contextlib.suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            own.add(str(IPv6Address(bytes.fromhex(line[:32]))))
    return own
