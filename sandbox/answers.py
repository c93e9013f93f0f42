"""What a route handler may return, turned into a status, headers and a body."""

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from hayhost.sdk import Response

__all__ = ["Answer", "Stream", "error_answer", "render", "stream_type"]

Stream: TypeAlias = "Iterator[Any] | AsyncIterator[Any]"

_JSON: Final = "application/json"
_TEXT: Final = "text/plain; charset=utf-8"
_BYTES: Final = "application/octet-stream"
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # RFC 9110, 5.5
_LENGTH = re.compile(r"[0-9]{1,18}")
_MAX_HEADERS: Final = 100
_MAX_NAME: Final = 256
_MAX_VALUE: Final = 16 << 10
_MAX_ALL: Final = 64 << 10


class Answer(NamedTuple):
    """``body`` is bytes or, for a streamed answer, the iterator that produces it."""

    status: int
    headers: list[tuple[str, str]]
    body: "bytes | Stream"


def error_answer(status: int, message: str) -> Answer:
    """A JSON error."""
    message = message.encode("utf-8", "backslashreplace").decode()  # lone surrogates are not UTF-8
    return Answer(status, [("content-type", _JSON)], msgspec.json.encode({"error": message}))


def stream_type(first: object) -> str:
    """The content type of a stream whose handler named none, from its first item."""
    return _TEXT if isinstance(first, str) else _BYTES


def render(value: Any) -> Answer:
    """The answer that ``value``, a handler's result, stands for.

    Raises ``TypeError`` or ``ValueError``, with a message for the author, if it stands for none.
    """
    status, headers = 200, []
    explicit = isinstance(value, Response)
    if explicit:
        status, headers, value = value.status, _headers(value.headers), value.body
    elif value is None:
        status = 204
    kind: str | None
    body: bytes | Stream
    if value is None:
        kind, body = None, b""
    elif isinstance(value, dict | list):
        kind, body = _JSON, _json(value)
    elif isinstance(value, str):
        kind, body = _TEXT, value.encode("utf-8")
    elif isinstance(value, bytes | bytearray | memoryview):
        kind, body = _BYTES, bytes(value)
    elif isinstance(value, Iterator | AsyncIterator):
        # A bare iterator's type is that of its first item; with a Response the head does not wait for it.
        kind, body = (_BYTES if explicit else None), value
    else:
        raise TypeError(
            f"a handler returns dict, list, str, bytes, None, Response or an iterator of bytes or str, "
            f"not {type(value).__name__}"
        )
    if isinstance(body, bytes):  # its length is what it is, whatever the author says
        headers = [(name, text) for name, text in headers if name != "content-length"]
    elif any(name == "content-length" and not _LENGTH.fullmatch(text) for name, text in headers):
        raise ValueError("the Content-Length of a Response must be a number of bytes")
    if kind is not None and not any(name == "content-type" for name, _ in headers):
        headers.append(("content-type", kind))
    return Answer(status, headers, body)


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except (TypeError, ValueError, RecursionError, OverflowError) as error:
        raise TypeError(f"the handler's result cannot be sent as JSON: {error}") from error


def _headers(given: dict[str, str]) -> list[tuple[str, str]]:
    if len(given) > _MAX_HEADERS:
        raise ValueError(f"a Response may have {_MAX_HEADERS} headers, not {len(given)}")
    for name, value in given.items():
        if not isinstance(name, str) or not _TOKEN.fullmatch(name) or len(name) > _MAX_NAME:
            raise ValueError(f"{str(name)[:_MAX_NAME]!r} is not a header name, or is too long")
        if not isinstance(value, str) or not _VALUE.fullmatch(value) or len(value) > _MAX_VALUE:
            raise ValueError(f"the value of header {name} has characters that a header cannot have, or is too long")
    if (size := sum(len(name) + len(value) for name, value in given.items())) > _MAX_ALL:
        raise ValueError(f"the headers of a Response may have {_MAX_ALL} characters, not {size}")
    return [(name.lower(), value.strip()) for name, value in given.items()]
