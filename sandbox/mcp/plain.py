"""A plain object of the plugin's as an MCP server."""

import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from .protocol import INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND, Call, McpError, encode
from .server import Failed, Server, usable

__all__ = ["PlainServer", "is_server"]

_INFO = {"protocolVersions": ["2025-11-25", "2026-07-28"], "capabilities": {"tools": {"listChanged": True}}}


def is_server(candidate: Any) -> bool:
    """Whether ``candidate`` has what makes a plain object a server."""
    return any(_member(candidate, name) for name in ("list_tools", "call_tool"))


class PlainServer(Server):
    """Asks an object, or a mapping, with any of ``list_tools``, ``call_tool`` and ``stop``.

    ``run`` calls a sync function on a thread and awaits an async one.
    """

    def __init__(
        self,
        id: str,
        target: Any,
        run: Callable[..., Awaitable[Any]],
        changed: Callable[[], None],
        failed: Failed,
    ) -> None:
        super().__init__(id, changed, failed)
        self._target = target
        self._run = run
        self._at_work = False  # its list_tools() is, on a thread
        self._listed: list[dict[str, Any]] | None = None
        self.info = msgspec.json.encode({**_INFO, "serverInfo": {"name": id, "version": ""}})
        self.state = "running"

    async def list(self, method: str) -> list[dict[str, Any]]:
        if method != "tools/list":
            raise McpError(METHOD_NOT_FOUND, "Method not found", method)
        function = _member(self._target, "list_tools")
        if function is None:
            return []
        if self._at_work:  # a server that hangs keeps one thread
            raise TimeoutError("it still hangs in an earlier list_tools()")

        def on_thread() -> Any:
            self._at_work = True
            try:
                return function()
            finally:
                self._at_work = False

        listed = await self._run(function if inspect.iscoroutinefunction(function) else on_thread)
        if isinstance(listed, Mapping):  # the shape in which MCP itself answers tools/list
            listed = listed.get("tools")
        tools = usable(self.id, method, listed or (), self._failed)
        if tools != self._listed:
            before, self._listed = self._listed, tools
            if before is not None:
                self.list_changed()
        return tools

    async def call_tool(self, name: str, arguments: Any) -> Any:
        function = _member(self._target, "call_tool")
        if function is None:
            raise McpError(INVALID_PARAMS, f"Unknown tool: {name}")
        return await self._run(function, name, arguments)

    async def request(self, call: Call, method: str, params: dict[str, Any]) -> dict[str, Any]:
        if method == "ping":
            return {}
        if method != "tools/call":
            raise McpError(METHOD_NOT_FOUND, "Method not found", method)
        name, arguments = params.get("name"), params.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, dict | None):
            raise McpError(INVALID_PARAMS, "tools/call needs a name, and arguments that are an object")
        if _member(self._target, "list_tools") and not any(tool["name"] == name for tool in self._listed or ()):
            try:
                tools = await self.list("tools/list")
            except (Exception, SystemExit) as error:
                raise McpError(INTERNAL_ERROR, f"the server failed to list its tools: {_text(error)}") from error
            if not any(tool["name"] == name for tool in tools):
                raise McpError(INVALID_PARAMS, f"Unknown tool: {name}")
        try:
            return _result(await self.call_tool(name, arguments or {}))
        except McpError:
            raise
        except (Exception, SystemExit) as error:
            self._failed(f"MCP tool {name!r} failed", error)
            return {"content": [{"type": "text", "text": _text(error)}], "isError": True}

    async def stop(self) -> None:
        if function := _member(self._target, "stop"):
            await self._run(function)


def _result(value: Any) -> dict[str, Any]:
    """A tool's result as MCP has it (2025-11-25, CallToolResult), unless it is that already."""
    if isinstance(value, Mapping) and isinstance(value.get("content"), list):
        return dict(value)
    text = value if isinstance(value, str) else encode(value).decode()
    structured = {"structuredContent": value} if isinstance(value, Mapping) else {}
    return {"content": [{"type": "text", "text": text}], **structured}


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _member(target: Any, name: str) -> Callable[..., Any] | None:
    function: Any = target.get(name) if isinstance(target, Mapping) else getattr(target, name, None)
    return function if callable(function) else None
