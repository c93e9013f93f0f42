"""Requests to the management API, checked before anything is done: JSON bodies, query strings, conditions."""

import json
import re
from collections import Counter
from typing import Any, Final, NoReturn, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from tornado.httputil import HTTPHeaders

from hayhost.errors import InvalidError, RequestError

__all__ = ["TAGS", "if_match", "if_none_match", "must_be_new", "parse_json", "read_body", "read_json", "read_query"]

T = TypeVar("T")

# The second is what curl and urllib call a body of which they were told nothing. No web page gets here with it: the
# front has looked at its origin.
_JSON: Final = ("application/json", "application/x-www-form-urlencoded")
_MAX_DEPTH: Final = 64
_MAX_QUERY: Final = 8 << 10
# Nothing else is done while a body is looked at, and no operation needs a larger one.
_MAX_BODY: Final = 1 << 20
_TAG: Final = re.compile(r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"')
TAGS: Final = rf"^(\*|{_TAG.pattern}([ \t]*,[ \t]*{_TAG.pattern})*)$"
"""What ``If-Match`` and ``If-None-Match`` may be."""


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    whole = dict(pairs)
    if len(whole) != len(pairs):
        double = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {double[:100]!r} is there twice")
    return whole


def read_json(body: bytes) -> Any:
    """The value of a JSON body.

    Raises ``RequestError``: 413 for a large one, 400 for what is not clearly JSON, or has what no config can have.
    """
    if len(body) > _MAX_BODY:
        raise RequestError(f"The body is larger than {_MAX_BODY} bytes", status=413)
    try:
        return parse_json(body)
    except ValueError as error:
        raise RequestError(f"The body {error}", status=400) from None


def parse_json(text: bytes) -> Any:
    """The value of ``text``. Raises ``ValueError``, saying what ``text`` is, for what is not clearly JSON."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_no_duplicates, parse_constant=_refuse_constant)
        _check(value, _MAX_DEPTH)
    except RecursionError:
        raise ValueError(f"is nested deeper than {_MAX_DEPTH} levels") from None
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except ValueError as error:
        raise ValueError(f"is not valid JSON: {error}") from None
    return value


def _check(value: Any, levels: int) -> None:
    if not levels:
        raise ValueError(f"nested deeper than {_MAX_DEPTH} levels")
    match value:
        case str():
            _check_text(value)
        case dict():
            for name, item in value.items():
                _check_text(name)
                _check(item, levels - 1)
        case list():
            for item in value:
                _check(item, levels - 1)
        case int() if not -(1 << 63) <= value < 1 << 64:
            raise ValueError("a whole number of more than 64 bits")
        case float() if value in (float("inf"), float("-inf")):
            raise ValueError("a number that is too large")


def _check_text(text: str) -> None:
    if "\0" in text:
        raise ValueError("text with a NUL character")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("text with half a surrogate pair") from None


def read_body(headers: HTTPHeaders, body: bytes, form: type[T]) -> T:
    """A JSON object of the given form.

    Raises as ``read_json``, ``RequestError`` with status 415 for another type, and ``InvalidError`` naming every wrong
    field.
    """
    kind = headers.get("Content-Type", "application/json").partition(";")[0].strip().lower()
    if kind not in _JSON:
        raise RequestError("The body must be application/json", status=415)
    value = read_json(body)
    if not isinstance(value, dict):
        raise InvalidError({"body": "must be an object"})
    return _fields(value, form, strict=True)


def read_query(query: str, form: type[T]) -> T:
    """A query string of the given form. Raises ``InvalidError`` naming every wrong parameter."""
    if len(query) > _MAX_QUERY:
        raise RequestError("The query is too long", status=400)
    values: dict[str, str] = {}
    for part in filter(None, query.split("&")):
        name, _, value = part.partition("=")
        try:
            name, value = (unquote_to_bytes(text.replace("+", " ")).decode() for text in (name, value))
        except UnicodeDecodeError:
            raise InvalidError({"query": "is not UTF-8"}) from None
        if name in values:
            raise InvalidError({name[:100]: "is there twice"})
        values[name] = value
    if any("\0" in text for pair in values.items() for text in pair):
        raise InvalidError({"query": "has a NUL character"})
    return _fields(values, form, strict=False)


def _fields(values: dict[str, Any], form: type[T], *, strict: bool) -> T:
    problems: dict[str, str] = {}
    fields = {field.encode_name: field for field in msgspec.structs.fields(form)}  # type: ignore[arg-type]
    for name in values:
        if name not in fields and len(problems) < InvalidError.MOST:
            problems[name[:100] or "''"] = f"there is no such field; there are: {', '.join(fields) or 'none'}"
    given: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in values:
            if field.required:
                problems[name] = "is required"
            continue
        try:
            given[field.name] = msgspec.convert(values[name], field.type, strict=strict)
        except msgspec.ValidationError as error:
            reason, _, path = str(error).partition(" - at ")
            where = path.strip("`").removeprefix("$").lstrip(".")
            problems[f"{name}.{where}" if where else name] = reason
        else:
            if not strict and given[field.name] is None:  # a query has no null: what is not there is left out
                problems[name] = "must not be null; leave it out"
    if problems:
        raise InvalidError(problems)
    return form(**given)


def if_match(headers: HTTPHeaders) -> list[str] | None:
    """The entity tags of ``If-Match`` (RFC 9110, 13.1.1); ``["*"]`` for any, ``None`` without the header.

    Raises ``RequestError`` for what is malformed. A weak tag is the tag of nothing here.
    """
    return _tags(headers, "If-Match")


def if_none_match(headers: HTTPHeaders, tag: str) -> bool:
    """Whether ``If-None-Match`` names ``tag``: the client has it already (RFC 9110, 13.1.2). Raises as ``if_match``."""
    tags = _tags(headers, "If-None-Match") or []
    return tags == ["*"] or tag in [given.removeprefix("W/") for given in tags]


def must_be_new(headers: HTTPHeaders) -> bool:
    """Whether ``If-None-Match: *`` asks for something that is not there yet. Raises ``RequestError`` for a tag."""
    tags = _tags(headers, "If-None-Match")
    if tags not in (None, ["*"]):
        raise RequestError("If-None-Match can only be * here", status=400)
    return tags is not None


def _tags(headers: HTTPHeaders, name: str) -> list[str] | None:
    given = headers.get(name)
    if given is None:
        return None
    if not re.fullmatch(TAGS, given := given.strip(" \t")):
        raise RequestError(f'{name} must be * or entity tags such as "1", in double quotes', status=400)
    return ["*"] if given == "*" else [found[0] for found in _TAG.finditer(given)]
