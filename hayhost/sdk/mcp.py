"""What ``ctx.mcp`` offers to a plugin."""

import os
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from ._checks import checked
from .config import OrgConfig
from .logger import Logger
from .types import AuthState

__all__ = ["AuthReader", "Mcp", "McpBackend", "McpInitContext"]


class AuthReader:
    """``ctx.auth``: the credentials the org connected with."""

    def __init__(self, state: AuthState | None) -> None:
        self._state = state

    def get(self) -> AuthState | None:
        """The org's credentials and the id of the method they belong to, or ``None`` if it has not connected."""
        return self._state


class McpInitContext:
    """What an MCP server's initializer receives."""

    def __init__(
        self, config: OrgConfig, auth: AuthReader, logger: Logger, changed: Callable[[], None] | None = None
    ) -> None:
        self.config = config
        self.auth = auth
        self.logger = logger
        self._changed = changed

    def tools_changed(self) -> None:
        """Say that ``list_tools()`` has something else to list from now on. From any thread."""
        if self._changed is not None:
            self._changed()


class McpBackend(Protocol):
    """The runtime behind ``ctx.mcp``: the worker's own, or the one of the test kit."""

    def start_local(self, id: str, initializer: Callable[[McpInitContext], Any]) -> Awaitable[None]: ...

    def start_local_stdio(
        self,
        id: str,
        command: str,
        args: list[str] | tuple[str, ...],
        cwd: str | os.PathLike[str] | None,
        env: Mapping[str, str],
        timeout: float | None,
    ) -> Awaitable[None]: ...

    def start_external(self, id: str, url: str, auth_headers: Mapping[str, str]) -> Awaitable[None]: ...


class Mcp:
    """``ctx.mcp``: the org's MCP servers of this plugin. All of them stop when the worker stops."""

    def __init__(self, backend: McpBackend) -> None:
        self._backend = backend

    @checked
    def start_local(self, id: str, initializer: Callable[[McpInitContext], Any]) -> Awaitable[None]:
        """Start an MCP server that lives in this worker.

        ``initializer(ctx)``, sync or async, returns an object with any of ``list_tools()``,
        ``call_tool(name, arguments)`` and ``stop()``, each sync or async, or a server object of the ``mcp`` package
        (``MCPServer`` or the low-level ``Server``). From an async hook, await the result; from a sync hook the call
        itself waits. Ids are unique per worker: a second server of the same id raises ``RegistrationError``; without
        the capability ``mcp`` it is ``CapabilityError``.
        """
        return self._backend.start_local(id, initializer)

    @checked
    def start_local_stdio(
        self,
        *,
        id: str,
        command: str,
        args: list[str] | tuple[str, ...] = (),
        cwd: str | os.PathLike[str] | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float | None = None,
    ) -> Awaitable[None]:
        """Start a program that speaks MCP on its standard streams, in the worker's own sandbox.

        ``command`` is a name or a path that the manifest lists in ``permissions.subprocess``; ``cwd`` is a folder in
        the plugin's, which is the default. The program's environment is the fixed minimal set and ``env``. It is
        started anew, with growing pauses, when it ends. ``timeout`` is the seconds that it may take to initialize (30
        unless given), to list what it has (5) and for every other answer (as long as the host waits).

        Waits, and raises ``RegistrationError``, as ``start_local`` does. Raises ``TimeoutError`` if it does not
        initialize in time, ``OSError`` if it cannot be started.
        """
        return self._backend.start_local_stdio(id, command, args, cwd, dict(env or {}), timeout)

    @checked
    def start_external(self, *, id: str, url: str, auth_headers: Mapping[str, str] | None = None) -> Awaitable[None]:
        """Use an MCP server somewhere else, by streamable HTTP; the manifest lists its host in ``permissions.network``.

        ``auth_headers`` are sent with every request and shown nowhere. Waits, and raises ``RegistrationError``, as
        ``start_local`` does; other exceptions say why it cannot be reached.
        """
        return self._backend.start_external(id, url, dict(auth_headers or {}))
