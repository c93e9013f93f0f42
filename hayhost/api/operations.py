"""The operations of the management API as a table: from it requests are routed, and the OpenAPI document is made."""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Literal

import msgspec

from hayhost.answers import Answer, Call
from hayhost.names import ORG_ID, PLUGIN_NAME

__all__ = ["PARAMETERS", "Operation", "Request", "pattern_of"]

Scope = Literal["open", "any", "org", "admin"]

PARAMETERS: Final = {
    "org": (ORG_ID.pattern, "An org's id."),
    "name": (PLUGIN_NAME.pattern, "A plugin's name."),
    "token": (r"[0-9a-f]{16}", "A token's id."),
}
"""The parameters of paths: what they look like, and what they are. No encoded form of them is recognised."""


class Request(msgspec.Struct, frozen=True):
    """A request that fits its operation: parameters of the path, query and body, each checked."""

    call: Call
    params: Mapping[str, str]
    query: Any
    body: Any


class Operation(msgspec.Struct, frozen=True):
    """One method of one path.

    ``scope`` says whose tokens it takes: ``admin``, ``org`` (also those of the org in the path), ``any``, or ``open``
    to all. ``answers`` has the form of each answer by its status, ``None`` for one without a body.
    """

    id: str
    method: str
    path: str
    summary: str
    scope: Scope
    run: Callable[[Request], Awaitable[Answer]]
    answers: Mapping[int, Any]
    query: Any = None
    body: Any = None
    body_optional: bool = False
    conditional: bool = False
    """Whether it takes ``If-Match``, and answers 412."""
    tagged: bool = False
    """Whether it takes ``If-None-Match``, and answers 304."""
    changes_plugin: bool = False
    """Whether it runs code of the plugin's, which must be loaded."""
    media: str = "application/json"
    navigation: bool = False
    """Whether a browser may be sent there by another site."""
    any_query: bool = False
    """Whether others decide what is in the query."""


def pattern_of(path: str) -> re.Pattern[str]:
    """The paths that a template stands for."""
    parts = re.split(r"\{(\w+)\}", path)
    return re.compile(
        "".join(
            f"(?P<{part}>{PARAMETERS[part][0]})" if index % 2 else re.escape(part) for index, part in enumerate(parts)
        )
    )
