"""What of a plugin's answer reaches the client: it is somebody else's code on the host's origin."""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final

from tornado.httputil import HTTPHeaders, ResponseStartLine

__all__ = ["BadRequestError", "BadResponseError", "body_length", "plugin_headers", "request_headers", "start_line"]

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
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
# What a browser may run as a page. No Content-Type at all is sniffed no more, thanks to nosniff, but shown.
_INERT = re.compile(
    r"(application/(json|octet-stream|pdf|zip|x-ndjson)|text/(plain|csv|event-stream|css)|image/(?!svg)[a-z0-9.+-]+)"
    r"\s*(;[^,]*)?"  # of several types, a browser takes the last one
)
_REASONS = {status.value: status.phrase for status in HTTPStatus}


class BadRequestError(ValueError):
    """A client's headers do not say clearly where its request ends."""


class BadResponseError(ValueError):
    """A worker answered with something that is not an HTTP header."""


def start_line(status: int) -> ResponseStartLine:
    """The start line for ``status``."""
    return ResponseStartLine("HTTP/1.1", status, _REASONS.get(status, "Unknown"))


def body_length(headers: HTTPHeaders) -> int:
    """The length of a request's body, 0 if it is not told in advance.

    Raises ``BadRequestError`` for what others might understand in another way (RFC 9112, 6.1 and 6.3).
    """
    given, coding = headers.get("Content-Length"), headers.get("Transfer-Encoding")
    if coding is not None and (given is not None or coding.lower() != "chunked"):
        raise BadRequestError("A body is either of a Content-Length or in the transfer coding chunked, and no other")
    if given is None:
        return 0
    lengths = {length.strip() for length in given.split(",")}
    length = lengths.pop()
    if lengths or not length.isascii() or not length.isdigit() or len(length) > 18:
        raise BadRequestError("The Content-Length must be one number")
    return int(length)


def request_headers(headers: HTTPHeaders) -> list[tuple[str, str]]:
    """The headers of a request that are for the plugin: all but the hop-by-hop ones."""
    dropped: frozenset[str] | set[str] = HOP_BY_HOP
    if (connection := headers.get("Connection")) is not None:
        dropped = HOP_BY_HOP.union(name.strip().lower() for name in connection.split(","))
    return [(lower, value) for name, value in headers.get_all() if (lower := name.lower()) not in dropped]


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
