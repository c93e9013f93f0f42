"""A request as a route handler receives it, and the explicit form of an answer."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qs

from ._checks import checked
from .errors import BadRequestError

if TYPE_CHECKING:
    from .contexts import HayStartContext

__all__ = ["FormFile", "Headers", "Request", "Response"]

# More fields than any form has; fewer than make parsing a burden.
_MAX_FIELDS = 1_000
_FORM_URLENCODED = "application/x-www-form-urlencoded"


class Headers(Mapping[str, str]):
    """Request headers: names compare without case; repeated ones are joined with ``", "`` (RFC 9110, 5.3)."""

    __slots__ = ("_pairs",)

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._pairs: dict[str, str] = {}
        for name, value in pairs:
            key = name.lower()
            separator = "; " if key == "cookie" else ", "
            self._pairs[key] = f"{self._pairs[key]}{separator}{value}" if key in self._pairs else value

    def __getitem__(self, name: str) -> str:
        return self._pairs[name.lower()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name.lower() in self._pairs

    def __repr__(self) -> str:
        return f"Headers({sorted(self._pairs)})"  # names only: values may be credentials


@dataclass(frozen=True, slots=True)
class FormFile:
    """A file part of a multipart form."""

    filename: str
    content_type: str
    content: bytes


class Request:
    """One HTTP request to a plugin's route.

    ``path`` is relative to the worker's root, as it was sent; ``params`` are the decoded parameters of the route;
    ``query`` has every value of every key; ``body`` is byte-exact; ``id`` also stands in the host's log.
    """

    __slots__ = ("_query", "_query_string", "body", "ctx", "headers", "id", "method", "params", "path")

    def __init__(
        self,
        *,
        method: str,
        path: str,
        ctx: "HayStartContext",
        params: Mapping[str, str] | None = None,
        query_string: str = "",
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        id: str = "",
    ) -> None:
        self.method = method
        self.path = path
        self.params: dict[str, str] = dict(params or {})
        self.headers = Headers(headers)
        self.body = body
        self.ctx = ctx
        self.id = id
        self._query_string = query_string
        self._query: dict[str, list[str]] | None = None

    @property
    def query(self) -> dict[str, list[str]]:
        """The query's values by key, in order; blank ones kept. Raises ``BadRequestError`` beyond 1,000 fields."""
        if self._query is None:
            self._query = _fields(self._query_string)
        return self._query

    def text(self) -> str:
        """The body as text, in the charset that its Content-Type names, else UTF-8.

        Raises ``BadRequestError`` if it is not.
        """
        charset = self._content_type()[1].get("charset", "utf-8")
        try:
            return self.body.decode(charset)
        except (UnicodeError, LookupError):
            raise BadRequestError(f"The body is not valid {charset} text") from None

    def json(self) -> Any:
        """The body as JSON (RFC 8259). Raises ``BadRequestError``, which answers 400 unless it is caught."""
        try:
            return json.loads(self.body, parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "not JSON text"
            raise BadRequestError(f"Malformed JSON: {reason}") from None

    def form(self) -> dict[str, list[str | FormFile]]:
        """The body as a form, URL-encoded or multipart: every value of every key, files as ``FormFile``.

        Raises ``BadRequestError`` for any other Content-Type and for a malformed body.
        """
        kind, options = self._content_type()
        if kind == _FORM_URLENCODED:
            try:
                return {key: list(values) for key, values in _fields(self.body.decode()).items()}
            except UnicodeDecodeError:
                raise BadRequestError("The form is not valid UTF-8") from None
        if kind == "multipart/form-data" and options.get("boundary"):
            return _multipart(self.body, options["boundary"])
        raise BadRequestError("The body is not a form (application/x-www-form-urlencoded or multipart/form-data)")

    def _content_type(self) -> tuple[str, dict[str, str]]:
        kind, *rest = self.headers.get("content-type", "").split(";")
        options = {}
        for part in rest:
            name, _, value = part.partition("=")
            options[name.strip().lower()] = value.strip().strip('"')
        return kind.strip().lower(), options

    def __repr__(self) -> str:
        return f"<Request {self.method} {self.path} id={self.id!r}>"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _fields(text: str) -> dict[str, list[str]]:
    try:
        return parse_qs(text, keep_blank_values=True, max_num_fields=_MAX_FIELDS)
    except ValueError:
        raise BadRequestError(f"More than {_MAX_FIELDS} form fields") from None


def _multipart(body: bytes, boundary: str) -> dict[str, list[str | FormFile]]:
    import io

    import multipart  # only plugins that read multipart forms pay for it

    result: dict[str, list[str | FormFile]] = {}
    try:
        size = len(body) + 1  # all of it is in memory already: nothing is spooled to a file
        parser = multipart.MultipartParser(
            io.BytesIO(body), boundary, part_limit=_MAX_FIELDS, spool_limit=size, memory_limit=size, strict=True
        )
        for part in parser:
            value: str | FormFile = (
                part.value if not part.filename else FormFile(part.filename, part.content_type, part.raw)
            )
            result.setdefault(part.name, []).append(value)
    except (multipart.MultipartError, UnicodeError, LookupError):  # a part names its charset, like a body does
        raise BadRequestError("Malformed multipart form") from None
    return result


class Response:
    """An answer with its status and headers; ``body`` may be anything that a handler may return."""

    __slots__ = ("body", "headers", "status")

    @checked
    def __init__(self, body: Any = None, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        if isinstance(status, bool) or not 200 <= status <= 599:
            raise ValueError(f"Response status must be from 200 to 599, not {status}")
        self.body = body
        self.status = status
        self.headers: dict[str, str] = dict(headers or {})
