"""What every MCP server of a worker has, whatever it is made of."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal

import msgspec

from hayhost import __version__

from .. import wire
from .protocol import LISTS, MAX_MESSAGE, Call

__all__ = ["INITIALIZE", "Failed", "Notice", "Server", "State", "info_of", "pages", "usable"]

# A server that does not list its tools within this many seconds is left out of the answer.
_LIST_TIMEOUT: Final = 5.0
MAX_ITEMS: Final = 10_000
_MAX_PAGES: Final = 1_000
_MAX_INFO: Final = 16 << 10
_MAX_INSTRUCTIONS: Final = 4_000
_MAX_LIST: Final = MAX_MESSAGE - (1 << 20)  # with what is around it, it has to fit into a message

Failed = Callable[[str, BaseException], None]
"""Logs, for the author, what went wrong and the error."""

Notice = Callable[[str, str, Any], None]
"""Hears of the server with an id, by which method, and with which params, it tells its clients something."""

State = Literal["starting", "running", "restarting", "failed"]

INITIALIZE: Final = {
    "protocolVersion": "2025-11-25",
    "capabilities": {"sampling": {}, "elicitation": {"form": {}, "url": {}}},
    "clientInfo": {"name": "hayhost", "version": __version__},
}
"""The params of ``initialize``. What the clients behind the host can do is not known yet; those that cannot, say so."""

_NAMES: Final = {
    "tools/list": ("name", "tool"),
    "resources/list": ("uri", "resource"),
    "resources/templates/list": ("uriTemplate", "resource template"),
    "prompts/list": ("name", "prompt"),
}


class Server(ABC):
    """One MCP server. ``changed`` is called whenever what ``describe`` says is another."""

    kind: Literal["local", "stdio", "external"] = "local"
    url: str = ""
    timeout: float | None = None
    """Seconds within which it has to answer whatever it is asked; ``None`` if its author has set no limit."""

    def __init__(self, id: str, changed: Callable[[], None], failed: Failed) -> None:
        self.id = id
        self.state: State = "starting"
        self.error = ""
        self.info: bytes = b""
        self.changes = 0
        self._changed = changed
        self._failed = failed

    def describe(self) -> wire.McpServer:
        """Its state, as the front is told."""
        return wire.McpServer(self.id, self.kind, self.url, self.state, self.error[:500], self.info, self.changes)

    def to(self, state: State, error: str = "") -> None:
        """Change its state, and say so."""
        self.state, self.error = state, error
        self._changed()

    def list_changed(self) -> None:
        """One of its lists is another."""
        self.changes += 1
        self._changed()

    @property
    def list_timeout(self) -> float:
        """Seconds within which it has to list what it has."""
        return _LIST_TIMEOUT if self.timeout is None else self.timeout

    @abstractmethod
    async def list(self, method: str) -> list[dict[str, Any]]:
        """All that it lists by ``method``, as it said it. Raises whatever goes wrong."""

    @abstractmethod
    async def call_tool(self, name: str, arguments: Any) -> Any:
        """The tool's result, as it gave it. Raises whatever goes wrong."""

    @abstractmethod
    async def request(self, call: Call, method: str, params: dict[str, Any]) -> dict[str, Any]:
        """The result of any other request than for a list. Raises ``McpError``."""

    @abstractmethod
    async def stop(self) -> None:
        """End it. Raises whatever goes wrong."""


def info_of(result: Mapping[str, Any], versions: Sequence[str], timeout: float | None = None) -> bytes:
    """What a server says of itself, as the front is told; what is too long is shortened or left out."""
    info = {key: result[key] for key in ("capabilities", "serverInfo", "instructions") if key in result}
    info = {"protocolVersions": list(versions), **info, **({"timeout": timeout} if timeout is not None else {})}
    encoded = msgspec.json.encode(info)
    if len(encoded) > _MAX_INFO and isinstance(info.get("instructions"), str):
        info["instructions"] = info["instructions"][:_MAX_INSTRUCTIONS]
        encoded = msgspec.json.encode(info)
    if len(encoded) > _MAX_INFO:
        capabilities = info.get("capabilities")
        known = ("tools", "resources", "prompts", "completions", "logging")
        info["capabilities"] = {key: {} for key in known if isinstance(capabilities, Mapping) and key in capabilities}
        info.pop("serverInfo", None)
        info.pop("instructions", None)
        encoded = msgspec.json.encode(info)
    return encoded


async def pages(method: str, page: Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]) -> list[Any]:
    """All items that ``page(params)`` lists, page by page, up to a few more than may be passed on."""
    found: list[Any] = []
    params: dict[str, Any] = {}
    size = 0
    for _ in range(_MAX_PAGES):
        result = await page(params)
        items = result.get(LISTS[method])
        found += items if isinstance(items, list) else []
        cursor = result.get("nextCursor")
        if not isinstance(cursor, str) or params.get("cursor") == cursor:
            break
        size += len(msgspec.json.encode(items))
        if len(found) > MAX_ITEMS or size > _MAX_LIST:
            break
        params = {"cursor": cursor}
    return found


def usable(server: str, method: str, items: Any, failed: Failed) -> list[dict[str, Any]]:
    """Those of ``items`` that can be passed on: objects with a name, JSON, and not too many. The others are logged."""
    key, what = _NAMES[method]
    found: list[dict[str, Any]] = []
    size = 0
    if isinstance(items, str | bytes) or not isinstance(items, Iterable):
        items = [items] if items is not None else []
    for item in items:
        if not isinstance(item, Mapping) or not isinstance(item.get(key), str):
            failed(f"MCP server {server!r} listed something that is not a {what}", TypeError(_shown(item)))
            continue
        try:
            size += len(msgspec.json.encode(item))
        except (TypeError, ValueError, RecursionError, OverflowError) as error:
            failed(f"MCP server {server!r} listed a {what} that is not JSON", error)
            continue
        if len(found) >= MAX_ITEMS or size > _MAX_LIST:
            failed(
                f"MCP server {server!r} lists too much: only its first {len(found)} {what}s are offered",
                ValueError(f"more than {MAX_ITEMS} {what}s or {_MAX_LIST} bytes"),
            )
            break
        found.append(dict(item))
    return found


def _shown(item: Any) -> str:
    try:
        return repr(item)[:200]
    except Exception:
        return type(item).__name__
