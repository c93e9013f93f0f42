"""Who may manage the host: bearer tokens, the host's own address, and which proxies are believed."""

import re
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Final, Protocol

from tornado.httputil import HTTPHeaders

from .answers import Principal
from .errors import HostError, RequestError
from .settings import Settings

__all__ = ["LOCAL", "Access", "Tokens", "is_loopback"]

LOCAL: Final = Principal("local")
"""Whoever reaches a host that has no tokens, which is on this machine."""

_OWN_NAMES: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_BEARER: Final = re.compile(r"Bearer +([\x21-\x7e]{1,200}) *", re.IGNORECASE)
_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d{1,5})?", re.IGNORECASE)


class Tokens(Protocol):
    """The tokens of a store, as far as they are needed here."""

    async def exist(self) -> bool: ...

    async def verify(self, secret: str) -> "Token | None": ...


class Token(Protocol):
    """A token that is good."""

    @property
    def id(self) -> str: ...

    @property
    def org_id(self) -> str | None: ...


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


class Access:
    """Decides whose request it is. Without a store there are no tokens, and only this machine reaches the host."""

    def __init__(self, settings: Settings, tokens: Tokens | None) -> None:
        self._tokens = tokens
        self._address = settings.host
        self._is_public = not is_loopback(settings.host)
        self._names = {*_OWN_NAMES, settings.host.lower(), *(name.lower() for name in settings.allowed_hosts)}
        self._proxies: list[IPv4Network | IPv6Network] = [ip_network(network) for network in settings.trusted_proxies]

    @property
    def has_tokens(self) -> bool:
        """Whether there can be tokens at all."""
        return self._tokens is not None

    async def check_listening(self) -> None:
        """Raises ``HostError`` if anybody on the network could manage the host."""
        if self._is_public and not (self._tokens is not None and await self._tokens.exist()):
            raise HostError(
                f"{self._address} is not a loopback address, and without a token anyone who reaches the host could "
                "manage its plugins. Make one with `hayhost token create NAME`, or listen on 127.0.0.1"
            )

    async def principal(self, headers: HTTPHeaders) -> Principal:
        """Who makes a request. Raises ``RequestError`` with status 401 if a token is needed, or not a good one."""
        if self._tokens is None:  # whatever they show is meant for somebody else
            return LOCAL
        if given := headers.get_list("Authorization"):
            found = _BEARER.fullmatch(given[0]) if len(given) == 1 else None
            token = await self._tokens.verify(found[1]) if found else None
            if token is None:
                raise _unauthorized("The token is not a good one", 'Bearer error="invalid_token"')
            return Principal(f"token:{token.id}", token.org_id)
        if await self._tokens.exist():
            raise _unauthorized("This needs a bearer token: Authorization: Bearer hay_...", "Bearer")
        return LOCAL

    def check_origin(self, headers: HTTPHeaders, peer: str, *, navigation: bool = False) -> None:
        """Refuse what a web page, or a name that was rebound to this machine, makes a browser send.

        With ``navigation`` a browser may have been sent here by another site. Raises ``RequestError``, status 403.
        """
        host, secure = self.reached(headers, peer)
        if not self._is_own(host):
            raise RequestError(
                "This host is managed at its own address only; the setting allowed_hosts gives it more names",
                status=403,
            )
        origin = headers.get("Origin")
        if (origin is not None and origin.lower() != f"{'https' if secure else 'http'}://{host}".lower()) or (
            not navigation and headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin")
        ):
            raise RequestError("Requests from other origins are refused", status=403)

    def _is_own(self, host: str) -> bool:
        found = _HOST.fullmatch(host)
        if found is None:
            return False
        name = found[1].strip("[]").lower()
        if name in self._names:
            return True
        try:  # no name leads a browser here under an address; but at a loopback address others are none of ours
            ip_address(name)
        except ValueError:
            return False
        return self._is_public

    def reached(self, headers: HTTPHeaders, peer: str) -> tuple[str, bool]:
        """The authority by which the client reached the host, and whether that was by TLS."""
        if self.trusts(peer):
            host = headers.get("X-Forwarded-Host", headers.get("Host", ""))
            proto = headers.get("X-Forwarded-Proto", "http")
            # Of several proxies the nearest one added the last word, and only that one is known to be ours.
            return host.rpartition(",")[2].strip(), proto.rpartition(",")[2].strip().lower() == "https"
        return headers.get("Host", ""), False

    def trusts(self, peer: str) -> bool:
        """Whether ``peer`` is a configured proxy, whose X-Forwarded-* headers are believed."""
        if not self._proxies:
            return False
        try:
            address = ip_address(peer)
        except ValueError:
            return False
        return any(address in network for network in self._proxies)


def _unauthorized(message: str, challenge: str) -> RequestError:
    return RequestError(message, status=401, headers={"WWW-Authenticate": challenge})
