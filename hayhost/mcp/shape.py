"""Lists of MCP servers, made fit for clients: one odd entry costs itself at most, never the list."""

import hashlib
import weakref
from typing import Any, Final

import msgspec
from mcp_types import methods
from mcp_types.version import LATEST_HANDSHAKE_VERSION, LATEST_MODERN_VERSION
from pydantic import ValidationError

__all__ = ["EMPTY", "KEYS", "MAX_ITEMS", "Items", "shape"]

KEYS: Final = {
    "tools/list": "tools",
    "prompts/list": "prompts",
    "resources/list": "resources",
    "resources/templates/list": "resourceTemplates",
}
"""The methods that list something, and the key of the result that has it."""

MAX_ITEMS: Final = 5_000
"""Entries of one list of one server; what comes after them is left out."""

_IDENTITY: Final = {"tools/list": "name", "prompts/list": "name", "resources/list": "uri"}
_REVISIONS: Final = (LATEST_HANDSHAKE_VERSION, LATEST_MODERN_VERSION)
_MENDS: Final = 20  # keys of one entry that may be wrong before it is given up


class Items:
    """The entries of one list, as clients may see them. The same list of many orgs is one object."""

    __slots__ = ("__weakref__", "digest", "entries", "left_out")

    def __init__(self, digest: bytes, entries: tuple[dict[str, Any], ...], left_out: int) -> None:
        self.digest = digest
        self.entries = entries
        self.left_out = left_out


EMPTY: Final = Items(b"", (), 0)

_known: weakref.WeakValueDictionary[bytes, Items] = weakref.WeakValueDictionary()


def shape(method: str, listed: Any) -> Items:
    """What a server answered to ``method``. It takes its time with long lists: call it on a thread."""
    if not isinstance(listed, list) or not listed:
        return EMPTY
    digest = hashlib.sha256(method.encode() + msgspec.json.encode(listed)).digest()
    if (known := _known.get(digest)) is not None:
        return known
    seen: set[Any] = set()
    entries: list[dict[str, Any]] = []
    identity = _IDENTITY.get(method, "uriTemplate")
    for entry in listed[:MAX_ITEMS]:
        mended = _mended(method, entry)
        if mended is not None and mended[identity] not in seen:
            seen.add(mended[identity])
            entries.append(mended)
    return _known.setdefault(digest, Items(digest, tuple(entries), len(listed) - len(entries)))


def _mended(method: str, given: Any) -> dict[str, Any] | None:
    """``given`` without the keys that clients could not read; ``None`` if nothing of use is left."""
    if not isinstance(given, dict):
        return None
    entry: dict[str, Any] = dict(given)
    entry.pop("serverId", None)
    if method == "tools/list":
        schema = entry.get("inputSchema")
        if not isinstance(schema, dict) or schema.get("type", "object") != "object":
            schema = {}
        entry["inputSchema"] = {"type": "object", **schema}
    for _ in range(_MENDS):
        try:
            for revision in _REVISIONS:
                methods.serialize_server_result(
                    method,
                    revision,
                    {KEYS[method]: [entry], "ttlMs": 0, "cacheScope": "private", "resultType": "complete"},
                )
            return entry
        except ValidationError as error:
            wrong = {str(problem["loc"][2]) for problem in error.errors(include_url=False) if len(problem["loc"]) > 2}
            if not wrong & entry.keys() or wrong & {"name", "uri", "uriTemplate"}:
                return None
            for key in wrong:
                entry.pop(key, None)
            if method == "tools/list":
                entry.setdefault("inputSchema", {"type": "object"})
        except (RecursionError, ValueError, TypeError):
            return None
    return None
