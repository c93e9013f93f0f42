"""Requests of the host itself to URLs that a plugin named.

A plugin is trusted by halves, so they go where the egress broker lets plugins go and nowhere else: an address is judged
after its name was resolved, and is the one that is connected to. No redirects, no proxies, little time and little data.
"""

import errno
import os
import re
import socket
import ssl
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import SplitResult, urlsplit

from tornado.iostream import StreamBufferFullError, StreamClosedError, UnsatisfiableReadError
from tornado.netutil import Resolver as TornadoResolver

from sandbox.broker.addresses import Policy
from sandbox.broker.dialler import DialError, Dialler
from sandbox.broker.names import literal, normalise
from sandbox.broker.resolver import Resolver, Share

from .errors import ProviderError

if TYPE_CHECKING:
    from tornado.simple_httpclient import SimpleAsyncHTTPClient

__all__ = ["Outbound", "split_url"]

_TIMEOUT: Final = 20.0
_MAX_ANSWER: Final = 64 << 10
_MAX_HEADER: Final = 16 << 10
_AT_ONCE: Final = 128
_URL: Final = re.compile(r"https?://[!-~]+")


def split_url(url: str) -> SplitResult:
    """The parts of an endpoint's URL. Raises ``ProviderError`` if it cannot be one."""
    try:
        parts = urlsplit(url)
        wrong = not _URL.fullmatch(url) or not parts.hostname or parts.port == 0
        if wrong or "\\" in url or "@" in parts.netloc or "#" in url:
            raise ValueError
    except ValueError:
        raise ProviderError(
            "an endpoint is not an https URL in ASCII, with a host, and without user, password and fragment"
        ) from None
    return parts


class Outbound:
    """Posts forms. ``allow`` are networks that may be reached although they are not public, also without TLS.

    ``nameserver`` (``address:port``) is asked instead of the system's resolver.
    """

    def __init__(self, *, allow: Iterable[str] = (), nameserver: str = "") -> None:
        self._policy = Policy(allow)
        self._dialler = Dialler(Resolver(nameserver), self._policy)
        self._shares: dict[str, Share] = {}  # by name: one that hangs holds up no other
        self._clients: dict[str, SimpleAsyncHTTPClient] = {}
        self._context: ssl.SSLContext | None = None

    async def addresses(self, scheme: str, host: str) -> list[bytes]:
        """The addresses that may be connected to. Raises ``DialError``."""
        try:
            name = host if literal(host) is not None else normalise(host)
        except ValueError as error:
            raise DialError(errno.EINVAL, f"the host is {error}", policy=True) from None
        found = await self._dialler.addresses(name, self._shares.setdefault(name, Share()))
        if scheme == "https":
            return found
        if allowed := [packed for packed in found if self._policy.allows(packed)]:
            return allowed
        raise DialError(errno.EPERM, f"{name} has to be used with https", policy=True)

    async def check(self, url: str) -> SplitResult:
        """The parts of a URL that a browser may be sent to. Raises ``ProviderError``."""
        parts = split_url(url)
        if parts.scheme != "https":
            try:
                await self.addresses(parts.scheme, str(parts.hostname))
            except DialError as error:
                raise ProviderError(error.text) from None
        return parts

    async def post(self, url: str, headers: dict[str, str], body: str) -> tuple[int, bytes]:
        """Status and body of the answer. Raises ``ProviderError``, without anything of what was sent."""
        from tornado.httpclient import HTTPClientError, HTTPRequest
        from tornado.simple_httpclient import HTTPTimeoutError

        parts = split_url(url)
        if self._context is None:
            self._context = ssl.create_default_context()
        request = HTTPRequest(
            url,
            "POST",
            headers,
            body,
            request_timeout=_TIMEOUT,
            connect_timeout=_TIMEOUT,
            follow_redirects=False,
            decompress_response=False,
            user_agent="hayhost",
            ssl_options=self._context,
        )
        host = parts.hostname
        try:
            response = await self._client(parts.scheme).fetch(request, raise_error=False)
        except DialError as error:
            raise ProviderError(error.text) from None
        except (HTTPTimeoutError, TimeoutError):
            raise ProviderError(f"{host} did not answer within {_TIMEOUT:g} s") from None
        except ssl.SSLCertVerificationError as error:
            raise ProviderError(f"{host} has no good certificate: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise ProviderError(f"{host} does not speak TLS as it should ({error.reason or 'broken off'})") from None
        except (HTTPClientError, StreamClosedError, StreamBufferFullError, UnsatisfiableReadError, ValueError):
            raise ProviderError(
                f"{host} broke off, or answered what is no HTTP or has more than {_MAX_ANSWER >> 10} KiB"
            ) from None
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else type(error).__name__
            raise ProviderError(f"{host} cannot be reached: {reason}") from None
        return response.code, response.body

    def _client(self, scheme: str) -> "SimpleAsyncHTTPClient":
        from tornado.simple_httpclient import SimpleAsyncHTTPClient

        if scheme not in self._clients:
            self._clients[scheme] = SimpleAsyncHTTPClient(
                force_instance=True,
                resolver=_Judging(self, scheme),
                max_clients=_AT_ONCE,
                max_buffer_size=_MAX_ANSWER + _MAX_HEADER,
                max_header_size=_MAX_HEADER,
                max_body_size=_MAX_ANSWER,
            )
        return self._clients[scheme]

    def close(self) -> None:
        """Post no more."""
        for client in self._clients.values():
            client.close()
        self._clients.clear()


class _Judging(TornadoResolver):
    """What is connected to is what this returns."""

    def initialize(self, outbound: Outbound, scheme: str) -> None:
        self._outbound = outbound
        self._scheme = scheme

    async def resolve(
        self, host: str, port: int, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[tuple[int, Any]]:
        found = await self._outbound.addresses(self._scheme, host)
        families = {4: socket.AF_INET, 16: socket.AF_INET6}
        return [(families[len(packed)], (socket.inet_ntop(families[len(packed)], packed), port)) for packed in found]
