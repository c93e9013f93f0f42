"""The MCP servers of one worker."""

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import msgspec

from hayhost.sdk.errors import RegistrationError
from hayhost.sdk.mcp import McpInitContext

__all__ = ["McpRuntime", "NoSuchToolError", "ToolFailedError"]

Call = Callable[..., Awaitable[Any]]

# A server that does not list its tools within this many seconds is left out of the answer.
LIST_TIMEOUT: Final = 5.0
MAX_SERVERS: Final = 100


class NoSuchToolError(Exception):
    """No running server lists the tool."""


class ToolFailedError(Exception):
    """The tool raised, or its server did; the cause says what."""


class McpRuntime:
    """Starts, asks and stops servers that live in the worker.

    ``call(function, *arguments)`` runs a sync function on a thread and awaits an async one; ``changed(ids)`` hears of
    every change of the set of running servers; ``failed(what, error)`` logs.
    """

    def __init__(
        self,
        context: McpInitContext,
        call: Call,
        need: Callable[[str], None],
        changed: Callable[[list[str]], None],
        failed: Callable[[str, BaseException], None],
        list_timeout: float = LIST_TIMEOUT,
    ) -> None:
        self._context = context
        self._call = call
        self._need = need
        self._changed = changed
        self._failed = failed
        self._list_timeout = list_timeout
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._servers: dict[str, Any] = {}
        self._starting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._owners: dict[str, str] = {}  # tool name -> server id, as last listed
        self._listings: dict[str, asyncio.Task[list[dict[str, Any]]]] = {}
        self._asked: set[str] = set()  # servers whose list_tools() is at work on a thread
        self._no_request = contextvars.copy_context()

    def start_local(self, id: str, initializer: Callable[[McpInitContext], Any]) -> Awaitable[None]:
        """See ``hayhost.sdk.Mcp.start_local``. From another thread it blocks until the server runs."""
        self._need("ctx.mcp.start_local()")
        if threading.get_ident() == self._thread:
            task = self._loop.create_task(self._start(id, initializer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return task
        asyncio.run_coroutine_threadsafe(self._start(id, initializer), self._loop).result()
        return _Done()

    async def _start(self, id: str, initializer: Callable[[McpInitContext], Any]) -> None:
        if not id:
            raise RegistrationError("an MCP server's id must not be empty")
        if id in self._servers or id in self._starting:
            raise RegistrationError(f"an MCP server with the id {id!r} runs already; ids are unique per worker")
        if len(self._servers) + len(self._starting) >= MAX_SERVERS:
            raise RegistrationError(f"a worker runs at most {MAX_SERVERS} MCP servers")
        self._starting.add(id)
        try:
            server = await self._call(initializer, self._context)
        except SystemExit as error:  # in a task of its own this would end the worker
            raise RuntimeError(f"the initializer of MCP server {id!r} called sys.exit({error.code!r})") from error
        finally:
            self._starting.discard(id)
        if not any(callable(_member(server, name)) for name in ("list_tools", "call_tool")):
            raise RegistrationError(
                f"the initializer of MCP server {id!r} returned {type(server).__name__}, "
                "which has neither list_tools() nor call_tool()"
            )
        self._servers[id] = server
        self._changed(list(self._servers))

    async def settle(self) -> None:
        """Wait for starts that the author did not await. Raises what the first of them raised."""
        await asyncio.gather(*self._tasks)

    async def list_tools(self) -> list[dict[str, Any]]:
        """The tools of all servers, each with its ``serverId``; servers that fail or hang are left out and logged."""
        lists = await asyncio.gather(*(self._list(id, server) for id, server in list(self._servers.items())))
        tools = [tool for tools in lists for tool in tools]
        owners: dict[str, str] = {}
        for tool in tools:
            owners.setdefault(tool["name"], tool["serverId"])  # of two tools of one name, the first server's
        self._owners = owners
        return tools

    async def _list(self, id: str, server: Any) -> list[dict[str, Any]]:
        function = _member(server, "list_tools")
        if function is None:
            return []
        listing = self._listings.get(id)
        if listing is None:
            # One at a time, apart from the request: a server that hangs keeps one thread, and no request from its end.
            listing = self._loop.create_task(self._ask(id, function), context=self._no_request.copy())
            self._listings[id] = listing
            listing.add_done_callback(lambda _: self._listings.pop(id, None))
        return await asyncio.shield(listing)

    async def _ask(self, id: str, function: Callable[..., Any]) -> list[dict[str, Any]]:
        if id in self._asked:
            self._failed(f"MCP server {id!r} still hangs in an earlier list_tools()", TimeoutError())
            return []

        def on_thread() -> Any:
            self._asked.add(id)
            try:
                return function()
            finally:
                self._asked.discard(id)

        try:
            async with asyncio.timeout(self._list_timeout):
                listed = await self._call(function if inspect.iscoroutinefunction(function) else on_thread)
            if isinstance(listed, Mapping):  # the shape in which MCP itself answers tools/list
                listed = listed.get("tools")
            return [tool for item in listed or () if (tool := self._tool(id, item)) is not None]
        except TimeoutError:
            self._failed(f"MCP server {id!r} did not list its tools within {self._list_timeout:g} s", TimeoutError())
        except (Exception, SystemExit) as error:
            self._failed(f"MCP server {id!r} failed to list its tools", error)
        return []

    def _tool(self, id: str, item: Any) -> dict[str, Any] | None:
        if isinstance(item, Mapping) and isinstance(item.get("name"), str):
            tool = {**item, "serverId": id}
            try:
                msgspec.json.encode(tool)
            except (TypeError, ValueError, RecursionError, OverflowError) as error:
                self._failed(f"MCP server {id!r} listed a tool that is not JSON", error)
            else:
                return tool
        else:
            self._failed(f"MCP server {id!r} listed something that is not a tool", TypeError(repr(item)[:200]))
        return None

    async def call_tool(self, name: str, arguments: Any) -> Any:
        """The result of a tool. Raises ``NoSuchToolError``, or ``ToolFailedError`` from what the tool raised."""
        if self._owners.get(name) not in self._servers:
            await self.list_tools()
        owner = self._owners.get(name)
        function = _member(self._servers.get(owner), "call_tool") if owner is not None else None
        if function is None:
            raise NoSuchToolError(name)
        try:
            return await self._call(function, name, arguments)
        except (Exception, SystemExit) as error:
            raise ToolFailedError(str(error) or type(error).__name__) from error

    async def stop(self, seconds: float) -> None:
        """Stop all servers, giving each at most ``seconds``."""
        servers, self._servers = self._servers, {}
        await asyncio.gather(*(self._stop(id, server, seconds) for id, server in servers.items()))

    async def _stop(self, id: str, server: Any, seconds: float) -> None:
        function = _member(server, "stop")
        if function is None:
            return
        try:
            async with asyncio.timeout(seconds):
                await self._call(function)
        except (Exception, SystemExit) as error:
            self._failed(f"MCP server {id!r} failed to stop", error)


class _Done:
    """An awaitable of something that is done."""

    def __await__(self) -> Any:
        return
        yield


def _member(server: Any, name: str) -> Callable[..., Any] | None:
    function: Any = server.get(name) if isinstance(server, Mapping) else getattr(server, name, None)
    return function if callable(function) else None
