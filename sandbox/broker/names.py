"""Names of hosts, and the rules of ``permissions.network`` that say which of them a plugin may connect to."""

import re
import socket
from collections.abc import Iterable
from typing import Final

__all__ = ["Rules", "literal", "normalise"]

MAX_NAME: Final = 253

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?")
# Resolvers read a name that ends in a number, such as 127.1 or 0x7f000001, as an address.
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")


def normalise(host: str) -> str:
    """The one spelling of a DNS name: lower case, no final dot.

    Raises ``ValueError`` for what is none: anything but ASCII, and all that some resolver reads as an address.
    """
    name = host.lower().removesuffix(".")
    labels = name.split(".")
    if not host.isascii() or len(name) > MAX_NAME or not all(map(_LABEL.fullmatch, labels)):
        raise ValueError("not a DNS name in ASCII")
    if _NUMBER.fullmatch(labels[-1]):
        raise ValueError("an IP address in an unusual spelling")
    return name


def literal(host: str) -> bytes | None:
    """The bytes of an IP address in its usual spelling, without a zone; ``None`` if ``host`` is not one."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            return socket.inet_pton(family, host)
        except (OSError, ValueError):
            continue
    return None


class Rules:
    """What one plugin may connect to: some names and ports, or with ``True`` any host."""

    def __init__(self, network: bool | Iterable[str]) -> None:
        self.any = network is True
        self._listed = frozenset() if isinstance(network, bool) else frozenset(network)
        self._names = {rule.rpartition(":")[0] for rule in self._listed}

    def allow(self, host: str, port: int) -> bool:
        """Whether ``host``, normalised or an address, may be connected to at ``port``; 0 asks for any port.

        ``*.example.com`` stands for one label, as in certificates. Addresses are on no list.
        """
        if self.any:
            return True
        if literal(host) is not None:
            return False
        wildcard = f"*.{host.partition('.')[2]}"
        if not port:
            return host in self._names or wildcard in self._names
        return f"{host}:{port}" in self._listed or f"{wildcard}:{port}" in self._listed
