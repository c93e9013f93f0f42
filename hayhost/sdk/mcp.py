"""What ``ctx.mcp`` offers to a plugin."""

from collections.abc import Awaitable, Callable
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

    def __init__(self, config: OrgConfig, auth: AuthReader, logger: Logger) -> None:
        self.config = config
        self.auth = auth
        self.logger = logger


class McpBackend(Protocol):
    """The runtime behind ``ctx.mcp``: the worker's own, or the one of the test kit."""

    def start_local(self, id: str, initializer: Callable[[McpInitContext], Any]) -> Awaitable[None]: ...


class Mcp:
    """``ctx.mcp``: the org's MCP servers of this plugin. All of them stop when the worker stops."""

    def __init__(self, backend: McpBackend) -> None:
        self._backend = backend

    @checked
    def start_local(self, id: str, initializer: Callable[[McpInitContext], Any]) -> Awaitable[None]:
        """Start an MCP server that lives in this worker.

        ``initializer(ctx)``, sync or async, returns an object with any of ``list_tools()``,
        ``call_tool(name, arguments)`` and ``stop()``, each sync or async. From an async hook, await the result; from a
        sync hook the call itself waits. Ids are unique per worker: a second server of the same id raises
        ``RegistrationError``; without the capability ``mcp`` it is ``CapabilityError``.
        """
        return self._backend.start_local(id, initializer)
