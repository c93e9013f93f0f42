"""The MCP servers of one worker: started, asked and stopped."""

import asyncio
import contextvars
import math
import os
import re
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import msgspec

from hayhost.sdk.errors import RegistrationError
from hayhost.sdk.mcp import McpInitContext

from .. import wire
from ..spec import PluginSpec
from .plain import PlainServer, is_server
from .prewarm import PACKAGE
from .protocol import INTERNAL_ERROR, INVALID_PARAMS, INVALID_REQUEST, LISTS, TIMED_OUT, Call, McpError, Replies, encode
from .server import Failed, Server

if TYPE_CHECKING:
    from .official import OfficialServer
    from .remote import RemoteServer

    _Starting = OfficialServer | RemoteServer

__all__ = ["McpRuntime", "NoSuchToolError", "ToolFailedError"]

Run = Callable[..., Awaitable[Any]]
_MAX_ID: Final = 128
_NOTICES: Final = 50  # per second, and at once; others are dropped
_MAX_NOTICE: Final = 64 << 10
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110, 5.6.2
_HEADER_VALUE: Final = re.compile(r"[\t\x20-\x7e]*")
_MAX_HEADERS: Final = 50
_DEBOUNCE: Final = 0.1  # seconds between two reports of changed lists


class NoSuchToolError(Exception):
    """No running server lists the tool."""


class ToolFailedError(Exception):
    """The tool raised, or its server did; the cause says what."""


class McpRuntime:
    """The servers by id.

    ``run(function, *arguments)`` runs a sync function on a thread and awaits an async one; ``changed(servers)`` hears
    of every change of the servers, ``noticed`` what they say apart from any request; ``failed(what, error)`` logs.
    """

    def __init__(
        self,
        spec: PluginSpec,
        context: McpInitContext,
        run: Run,
        need: Callable[[str], None],
        changed: Callable[[list[wire.McpServer]], None],
        noticed: Callable[[wire.McpNotice], None],
        failed: Failed,
    ) -> None:
        self._spec = spec
        self._context = context
        self._run = run
        self._need = need
        self._report = changed
        self._noticed = noticed
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._servers: dict[str, Server] = {}
        self._starting: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._owners: dict[str, str] = {}  # tool name -> server id, as last listed
        self._listings: dict[tuple[str, str], asyncio.Task[list[dict[str, Any]]]] = {}
        self._replies = Replies()
        self._report_at = 0.0
        self._report_due: asyncio.TimerHandle | None = None
        self._notices = float(_NOTICES)
        self._notices_at = 0.0
        self._no_request = contextvars.copy_context()

    # ---- starting

    def start_local(self, id: str, initializer: Callable[[McpInitContext], Any]) -> Awaitable[None]:
        """See ``hayhost.sdk.Mcp.start_local``. From another thread it blocks until the server runs."""
        return self._begin("ctx.mcp.start_local()", id, self._local(id, initializer))

    def _begin(self, call: str, id: str, start: Coroutine[Any, Any, None]) -> Awaitable[None]:
        try:
            self._need(call)
        except BaseException:
            start.close()
            raise
        if threading.get_ident() == self._thread:
            task = self._loop.create_task(self._reserved(id, start))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            return task
        asyncio.run_coroutine_threadsafe(self._reserved(id, start), self._loop).result()
        return _Done()

    async def _reserved(self, id: str, start: Coroutine[Any, Any, None]) -> None:
        try:
            if not id:
                raise RegistrationError("an MCP server's id must not be empty")
            if len(id) > _MAX_ID:
                raise RegistrationError(f"an MCP server's id has at most {_MAX_ID} characters, not {len(id)}")
            known = self._servers.get(id)
            if (known is not None and known.state != "failed") or id in self._starting:
                raise RegistrationError(f"an MCP server with the id {id!r} runs already; ids are unique per worker")
            if len(self._servers) + len(self._starting) >= wire.MAX_MCP_SERVERS:
                raise RegistrationError(f"a worker runs at most {wire.MAX_MCP_SERVERS} MCP servers")
            self._starting.add(id)
        except BaseException:
            start.close()
            raise
        try:
            await start
        finally:
            self._starting.discard(id)
        self._tell()

    async def _local(self, id: str, initializer: Callable[[McpInitContext], Any]) -> None:
        try:
            context = self._context

            def changed() -> None:
                self._loop.call_soon_threadsafe(self._tools_changed, id)

            target = await self._run(initializer, McpInitContext(context.config, context.auth, context.logger, changed))
        except SystemExit as error:  # in a task of its own this would end the worker
            raise RuntimeError(f"the initializer of MCP server {id!r} called sys.exit({error.code!r})") from error
        if PACKAGE in sys.modules:
            from .official import OfficialServer, is_official

            if is_official(target):
                await self._start(OfficialServer(id, target, self._tell_soon, self._failed, self._notice))
                return
        if not is_server(target):
            raise RegistrationError(
                f"the initializer of MCP server {id!r} returned {type(target).__name__}, "
                "which has neither list_tools() nor call_tool() and is no server of the mcp package"
            )
        self._servers[id] = PlainServer(id, target, self._run, self._tell_soon, self._failed)

    def _tools_changed(self, id: str) -> None:
        if server := self._servers.get(id):
            server.list_changed()

    def start_local_stdio(
        self,
        id: str,
        command: str,
        args: Sequence[str],
        cwd: str | os.PathLike[str] | None,
        env: Mapping[str, str],
        timeout: float | None,
    ) -> Awaitable[None]:
        """See ``hayhost.sdk.Mcp.start_local_stdio``."""
        return self._begin("ctx.mcp.start_local_stdio()", id, self._stdio(id, command, args, cwd, env, timeout))

    async def _stdio(
        self,
        id: str,
        command: str,
        args: Sequence[str],
        cwd: str | os.PathLike[str] | None,
        env: Mapping[str, str],
        timeout: float | None,
    ) -> None:
        from .stdio import StdioServer, program, working_directory

        if timeout is not None and not (math.isfinite(timeout) and timeout > 0):
            raise RegistrationError(f"timeout is a number of seconds above 0, not {timeout!r}")
        if any("\0" in text for text in (command, *args, *env, *env.values())) or any("=" in name for name in env):
            raise RegistrationError("command, args and env have no NUL, and names in env have no '='")
        path = program(command, self._spec.subprocess, self._spec.folder)
        place = working_directory(cwd, self._spec.folder)
        log = self._context.logger

        def say(line: str) -> None:
            log.info(f"{id}: {line}")

        await self._start(
            StdioServer(id, [path, *args], place, env, timeout, self._tell_soon, self._failed, self._notice, say)
        )

    def start_external(self, id: str, url: str, auth_headers: Mapping[str, str]) -> Awaitable[None]:
        """See ``hayhost.sdk.Mcp.start_external``."""
        return self._begin("ctx.mcp.start_external()", id, self._external(id, url, auth_headers))

    async def _external(self, id: str, url: str, headers: Mapping[str, str]) -> None:
        from .external import ExternalServer

        if len(headers) > _MAX_HEADERS:
            raise RegistrationError(f"auth_headers has at most {_MAX_HEADERS} headers, not {len(headers)}")
        for name, value in headers.items():
            if not _HEADER_NAME.fullmatch(name):
                raise RegistrationError("auth_headers has a name that is no header's")
            if not _HEADER_VALUE.fullmatch(value):
                raise RegistrationError(f"auth_headers has a value for {name} that no header can have")
        await self._start(ExternalServer(id, url, headers, None, self._tell_soon, self._failed, self._notice))

    async def _start(self, server: "_Starting") -> None:
        self._servers[server.id] = server
        self._tell()
        try:
            await server.start()
        except BaseException as error:
            server.to("failed", str(error) or type(error).__name__)
            self._tell()
            raise

    async def settle(self) -> None:
        """Wait for starts that the author did not await. Raises what the first of them raised."""
        await asyncio.gather(*self._tasks)

    # ---- reporting

    def _tell(self) -> None:
        if self._report_due is not None:
            self._report_due.cancel()
            self._report_due = None
        self._report_at = self._loop.time()
        self._report([server.describe() for server in self._servers.values()])

    def _tell_soon(self) -> None:
        if self._report_due is None:
            self._report_due = self._loop.call_at(max(self._loop.time(), self._report_at + _DEBOUNCE), self._tell)

    def _notice(self, id: str, method: str, params: Any) -> None:
        now = self._loop.time()
        self._notices = min(_NOTICES, self._notices + (now - self._notices_at) * _NOTICES)
        self._notices_at = now
        try:
            said = encode({"method": method, "params": params or {}})
        except McpError:
            return
        if self._notices >= 1 and len(said) <= _MAX_NOTICE:
            self._notices -= 1
            self._noticed(wire.McpNotice(id, said))

    # ---- asking

    async def list_tools(self) -> list[dict[str, Any]]:
        """The tools of all servers, each with its ``serverId``; servers that fail or hang are left out and logged."""
        lists = await asyncio.gather(*(self._tools(server) for server in self._known()))
        tools = [tool for tools in lists for tool in tools]
        owners: dict[str, str] = {}
        for tool in tools:
            owners.setdefault(tool["name"], tool["serverId"])  # of two tools of one name, the first server's
        self._owners = owners
        return tools

    def _known(self) -> list[Server]:
        return [server for server in self._servers.values() if server.state != "failed"]

    async def _tools(self, server: Server) -> list[dict[str, Any]]:
        try:
            return [{**tool, "serverId": server.id} for tool in await self._list(server, "tools/list")]
        except TimeoutError as error:
            self._failed(f"MCP server {server.id!r} did not list its tools in time", error)
        except (Exception, SystemExit) as error:
            self._failed(f"MCP server {server.id!r} failed to list its tools", error)
        return []

    async def _list(self, server: Server, method: str) -> list[dict[str, Any]]:
        listing = self._listings.get((server.id, method))
        if listing is None:
            # One at a time, apart from the request: a server that hangs keeps no request from its end.
            listing = self._loop.create_task(self._listing(server, method), context=self._no_request.copy())
            self._listings[server.id, method] = listing
            listing.add_done_callback(lambda _: self._listings.pop((server.id, method), None))
        return await asyncio.shield(listing)

    async def _listing(self, server: Server, method: str) -> list[dict[str, Any]]:
        seconds = server.list_timeout
        try:
            async with asyncio.timeout(seconds) as limit:
                return await server.list(method)
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"it did not answer within {seconds:g} s") from None
        except SystemExit as error:  # in a task of its own this would end the worker
            raise RuntimeError(f"it called sys.exit({error.code!r})") from error

    async def call_tool(self, name: str, arguments: Any) -> Any:
        """The result of a tool. Raises ``NoSuchToolError``, or ``ToolFailedError`` from what the tool raised."""
        if self._owners.get(name) not in self._servers:
            await self.list_tools()
        server = self._servers.get(self._owners.get(name, ""))
        if server is None:
            raise NoSuchToolError(name)
        try:
            return await server.call_tool(name, arguments)
        except (Exception, SystemExit) as error:
            raise ToolFailedError(str(error) or type(error).__name__) from error

    def answer(self, body: bytes) -> AsyncIterator[bytes]:
        """The lines of the answer to a request of the kind ``wire.MCP``."""
        message: Any
        try:
            message = msgspec.json.decode(body)
        except (msgspec.DecodeError, RecursionError):
            message = None
        message = message if isinstance(message, dict) else {}
        token = message.get("progressToken")
        call = Call(
            message.get("server") if isinstance(message.get("server"), str) else "",
            message.get("method") if isinstance(message.get("method"), str) else "",
            self._replies,
            token if isinstance(token, str | int) and not isinstance(token, bool) else None,
        )
        return call.answer(lambda call: self._answer(call, message))

    async def _answer(self, call: Call, message: Mapping[str, Any]) -> dict[str, Any]:
        if "reply" in message:
            self._replies.give(call.server, message)
            return {}
        method, params = message.get("method"), message.get("params")
        if not isinstance(method, str) or not isinstance(params, dict | None):
            raise McpError(INVALID_REQUEST, "a request has a server, a method and params that are an object")
        server = self._servers.get(call.server)
        if server is None:
            raise McpError(INVALID_PARAMS, f"no MCP server {call.server!r} runs here")
        timeout = message.get("timeout")
        seconds = float(timeout) if isinstance(timeout, int | float) and timeout > 0 else server.timeout
        try:
            async with asyncio.timeout(seconds) as limit:
                if method in LISTS:
                    return {LISTS[method]: await self._list(server, method)}
                return await server.request(call, method, dict(params or {}))
        except McpError:
            raise
        except TimeoutError as error:
            why = f"it did not answer within {seconds:g} s" if limit.expired() else str(error)
            raise McpError(TIMED_OUT, f"MCP server {server.id!r}: {why}") from None
        except (Exception, SystemExit) as error:
            self._failed(f"MCP server {server.id!r} failed at {method[:100]}", error)
            raise McpError(INTERNAL_ERROR, f"{type(error).__name__}: {error}"[:1000]) from error

    # ---- the end

    async def stop(self, seconds: float) -> None:
        """Stop all servers, giving each at most ``seconds``."""
        servers, self._servers = self._servers, {}
        await asyncio.gather(*(self._stop(server, seconds) for server in servers.values()))

    async def _stop(self, server: Server, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await server.stop()
        except (Exception, SystemExit) as error:
            self._failed(f"MCP server {server.id!r} failed to stop", error)


class _Done:
    """An awaitable of something that is done."""

    def __await__(self) -> Any:
        return
        yield
