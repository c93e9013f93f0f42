"""A server somewhere else, reached over streamable HTTP through the worker's own network permission.

What the author gave as credentials is sent and never shown: errors name the URL without userinfo and query.
"""

import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Final
from urllib.parse import urlsplit, urlunsplit

import httpx2
from mcp.client._transport import TransportStreams
from mcp.client.streamable_http import streamable_http_client

from hayhost.sdk.errors import RegistrationError

from .protocol import MAX_MESSAGE
from .remote import RemoteServer, ServerLostError
from .server import Failed, Notice

__all__ = ["ExternalServer", "public_url"]

_CONNECT: Final = 30.0
_READ: Final = 300.0  # between two pieces of a streamed answer; who waits has a limit of their own
_MAX_URL: Final = 1_000

# What they say of each request has the whole URL in it, and the name of the session.
for _name in ("httpx2", "mcp.client.streamable_http"):
    logging.getLogger(_name).setLevel(logging.WARNING)


def public_url(url: str) -> str:
    """``url`` without what may be secret in it. Raises ``RegistrationError`` if it is not a URL of a server."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise RegistrationError("the URL of an external MCP server is not one") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise RegistrationError("the URL of an external MCP server begins with https:// or http:// and a host")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    shown = urlunsplit((parts.scheme, host if port is None else f"{host}:{port}", parts.path, "", ""))
    if len(shown) > _MAX_URL:
        raise RegistrationError(f"the URL of an external MCP server has at most {_MAX_URL} characters")
    return shown


class ExternalServer(RemoteServer):
    """``headers`` go with every request."""

    kind = "external"

    def __init__(
        self,
        id: str,
        url: str,
        headers: Mapping[str, str],
        timeout: float | None,
        changed: Callable[[], None],
        failed: Failed,
        notice: Notice,
    ) -> None:
        super().__init__(id, timeout, changed, failed, notice)
        self.url = public_url(url)
        self._full_url = url
        self._headers = dict(headers)

    @contextlib.asynccontextmanager
    async def connect(self) -> AsyncIterator[TransportStreams]:
        client = httpx2.AsyncClient(
            headers=self._headers,
            timeout=httpx2.Timeout(_CONNECT, read=_READ),
            transport=_Bounded(),
            trust_env=False,
        )
        try:
            async with (
                client,
                streamable_http_client(self._full_url, http_client=client, max_sse_event_size=MAX_MESSAGE) as streams,
            ):
                yield streams
        except* httpx2.HTTPError as errors:
            raise ServerLostError(f"cannot reach {self.url}: {_reason(errors)}") from None


def _reason(error: BaseException) -> str:
    """The innermost reason: the sandbox's, which says what to declare, is below those of the libraries."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    text = str(error) or type(error).__name__
    inner: BaseException | None = error
    for _ in range(10):
        if inner is None:
            break
        if isinstance(inner, PermissionError):
            return inner.strerror or str(inner)
        inner = inner.__cause__ or inner.__context__
    return text


class _Bounded(httpx2.AsyncHTTPTransport):
    """Ends an answer that is no stream of events at ``MAX_MESSAGE`` bytes."""

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        if not response.headers.get("content-type", "").lower().startswith("text/event-stream"):
            assert isinstance(response.stream, httpx2.AsyncByteStream)
            response.stream = _Limited(response.stream)
        return response


class _Limited(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for data in self._stream:
            size += len(data)
            if size > MAX_MESSAGE:
                raise httpx2.StreamError(f"the answer is larger than {MAX_MESSAGE} bytes")
            yield data

    async def aclose(self) -> None:
        await self._stream.aclose()
