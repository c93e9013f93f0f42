"""What of a plugin's answer reaches the client: it is somebody else's code on the host's origin."""

import re
from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import Final, NamedTuple

from tornado.httputil import HTTPHeaders, ResponseStartLine

__all__ = [
    "BadRequestError",
    "BadResponseError",
    "RequestHead",
    "plugin_headers",
    "read_head",
    "start_line",
    "whole_head",
]

HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""RFC 9110, 7.6.1: these concern one connection, not the message."""

# What proxies say of the client.
_PROXIES: Final = frozenset(
    {
        "forwarded",
        "x-forwarded-for",
        "x-forwarded-host",
        "x-forwarded-port",
        "x-forwarded-prefix",
        "x-forwarded-proto",
        "x-forwarded-server",
        "x-forwarded-ssl",
        "x-real-ip",
    }
)
# What is looked at: most headers are none of these.
_NOTED: Final = HOP_BY_HOP | _PROXIES | {"host", "content-length", "expect", "authorization"}
# Headers that speak for the whole origin, which is the host's and not the plugin's, or that the front writes itself.
_NOT_THEIRS: Final = HOP_BY_HOP | {
    "alt-svc",
    "clear-site-data",
    "content-length",
    "date",
    "expect-ct",
    "nel",
    "origin-agent-cluster",
    "public-key-pins",
    "report-to",
    "reporting-endpoints",
    "server",
    "service-worker-allowed",
    "sourcemap",
    "strict-transport-security",
    "x-content-type-options",
}
_HOST_TOKEN = re.compile(r"\bhay_[0-9a-f]{16}_")
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
# What a browser may run as a page. No Content-Type at all is sniffed no more, thanks to nosniff, but shown.
_INERT = re.compile(
    r"(application/(json|octet-stream|pdf|zip|x-ndjson)|text/(plain|csv|event-stream|css)|image/(?!svg)[a-z0-9.+-]+)"
    r"\s*(;[^,]*)?"  # of several types, a browser takes the last one
)
# Heads up to this size are remembered: what handlers without headers of their own answer with, and not much more.
_FEW: Final = 4
_SHORT: Final = 256
_REASONS = {status.value: status.phrase for status in HTTPStatus}


class BadRequestError(ValueError):
    """A client's headers do not say clearly where its request ends."""


class BadResponseError(ValueError):
    """A worker answered with something that is not an HTTP header."""


def start_line(status: int) -> ResponseStartLine:
    """The start line for ``status``."""
    return ResponseStartLine("HTTP/1.1", status, _REASONS.get(status, "Unknown"))


class RequestHead(NamedTuple):
    """What the host has to know of a request's headers, and those that are for the plugin."""

    length: int
    """Of the body; 0 if it is not told in advance."""
    hosts: int
    expects: bool
    plain: bool
    """Whether it says nothing about its connection: what HTTP/1.1 does without being asked is what it wants."""
    closes: bool
    """Whether the client wants the connection to end with the answer."""
    has_token: bool
    """Whether one of the host's is shown."""
    for_plugin: list[tuple[str, str]]


def read_head(headers: HTTPHeaders, *, forwarded: bool = False) -> RequestHead:
    """Look at each header once. For the plugin are not the hop-by-hop ones, and no token of the host's.

    What proxies add is left out unless it was ``forwarded`` by one that is believed: anybody can claim to be one.

    Raises ``BadRequestError`` for what others might understand in another way (RFC 9112, 6.1 and 6.3).
    """
    hosts = 0
    expects = secret = False
    lengths: list[str] = []
    codings: list[str] = []
    connection: list[str] = []
    kept: list[tuple[str, str]] = []
    for name, value in headers.get_all():
        lower = name.lower()
        if lower in _NOTED:
            if lower == "host":
                hosts += 1
            elif lower == "content-length":
                lengths.append(value)
            elif lower == "transfer-encoding":
                codings.append(value)
            elif lower == "connection":
                connection.append(value)
            elif lower == "expect":
                expects = True
            elif lower == "authorization":
                secret = secret or _HOST_TOKEN.search(value) is not None
            if lower in HOP_BY_HOP or (lower in _PROXIES and not forwarded):
                continue
        kept.append((lower, value))
    if codings and (lengths or len(codings) > 1 or codings[0].lower() != "chunked"):
        raise BadRequestError("A body is either of a Content-Length or in the transfer coding chunked, and no other")
    closes = False
    if connection:
        dropped = {name.strip().lower() for name in ",".join(connection).split(",")}
        closes = "close" in dropped
        kept = [pair for pair in kept if pair[0] not in dropped]
    if secret:
        kept = [pair for pair in kept if pair[0] != "authorization"]
    return RequestHead(_length(lengths) if lengths else 0, hosts, expects, not connection, closes, secret, kept)


def _length(given: list[str]) -> int:
    length, *others = {length.strip() for length in ",".join(given).split(",")}
    if others or not length.isascii() or not length.isdigit() or len(length) > 18:
        raise BadRequestError("The Content-Length must be one number")
    return int(length)


def whole_head(status: int, given: list[tuple[str, str]], base: str) -> bytes:
    """The start line and headers of a worker's answer whose body is there, all but those that end the head.

    As ``plugin_headers``, of which it is the encoded form. Raises ``BadResponseError``.
    """
    if len(given) <= _FEW and sum(len(name) + len(value) for name, value in given) <= _SHORT:
        block, for_base = _known_head(status, tuple(given))
        if not for_base:
            return block
    return _encode_head(status, given, base)


@lru_cache(1024)
def _known_head(status: int, given: tuple[tuple[str, str], ...]) -> tuple[bytes, bool]:
    """What most answers have is worked out once; whether it depends on where the worker is, too."""
    if any(name.lower() == "set-cookie" for name, _ in given):
        return b"", True
    return _encode_head(status, given, ""), False


def _encode_head(status: int, given: Iterable[tuple[str, str]], base: str) -> bytes:
    headers, _ = plugin_headers(given, base)
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}\r\n"]
    lines += [f"{name}: {value}\r\n" for name, value in headers.get_all()]
    return "".join(lines).encode("latin-1")


def plugin_headers(given: Iterable[tuple[str, str]], base: str) -> tuple[HTTPHeaders, int | None]:
    """The headers to send for a worker's answer, and the length of the body if the worker gave one.

    ``base`` is the worker's root path, to which cookies are confined. Raises ``BadResponseError``.
    """
    headers = HTTPHeaders()
    length: int | None = None
    kind = ""
    for name, value in given:
        if not _TOKEN.fullmatch(name) or not _VALUE.fullmatch(value):
            raise BadResponseError("a header's name or value has characters that it cannot have")
        lower, value = name.lower(), value.strip(" \t")
        if lower == "content-length":
            if not value.isascii() or not value.isdigit() or len(value) > 18 or length is not None:
                raise BadResponseError("not a Content-Length")
            length = int(value)
        elif lower == "set-cookie":
            headers.add("Set-Cookie", _confined_cookie(value, base))
        elif lower not in _NOT_THEIRS:
            if lower == "content-type":
                kind = f"{kind},{value.lower()}" if kind else value.lower()
            headers.add(name, value)
    headers.add("X-Content-Type-Options", "nosniff")
    if not _INERT.fullmatch(kind):
        headers.add("Content-Security-Policy", "sandbox")
    return headers, length


def _confined_cookie(value: str, base: str) -> str:
    """The cookie without its Domain, and with the worker's own path unless it names one below it."""
    first, *attributes = (part.strip() for part in value.split(";"))
    kept = [first]
    path = base
    for attribute in attributes:
        name, _, text = attribute.partition("=")
        match name.strip().lower():
            case "domain":
                pass
            case "path":
                wanted = text.strip()
                if wanted.startswith(base) and ".." not in wanted and "%" not in wanted:
                    path = wanted
            case _:
                kept.append(attribute)
    return "; ".join([*kept, f"Path={path}"])
