"""What the host's own handlers are given and what they return."""

from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
from tornado.httputil import HTTPHeaders

__all__ = ["Answer", "Call", "Handler", "NotYetError", "Principal"]


class Principal(msgspec.Struct, frozen=True):
    """Who asks. ``org_id`` is the only org that they may touch; ``None``: all of them. ``actor`` names them in the
    audit log."""

    actor: str
    org_id: str | None = None

    def may(self, org: str) -> bool:
        """Whether they may touch this org."""
        return self.org_id in (None, org)


class Call(msgspec.Struct, frozen=True):
    """A request to the host itself. ``origin`` is the scheme and authority by which the client reached it."""

    method: str
    path: str
    query: str
    headers: HTTPHeaders
    body: bytes
    principal: Principal
    origin: str
    secure: bool


class Answer(msgspec.Struct, frozen=True):
    """An answer of the host's own: JSON, or bytes as they are or as they come, with a Content-Type of their own."""

    status: int
    body: object = None
    headers: dict[str, str] = {}


Handler = Callable[[Call], Awaitable[Answer]]
Chunks = AsyncIterator[bytes]


class NotYetError(Exception):
    """The request cannot be routed before ``until()`` has come to its end; ``otherwise`` says what is missing."""

    def __init__(self, until: Callable[[], Awaitable[object]], otherwise: str) -> None:
        super().__init__(otherwise)
        self.until = until
        self.otherwise = otherwise
