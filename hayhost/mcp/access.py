"""Who may use which tools, and who did."""

from typing import Any, Literal, Protocol

import msgspec

from hayhost.installs import ToolLists
from hayhost.logs import get_logger

__all__ = ["Audit", "LogAudit", "NoLists", "Outcome", "ToolCall", "ToolPolicy"]

Outcome = Literal["ok", "tool error", "error", "denied", "refused", "unavailable", "timeout", "cancelled"]


class ToolPolicy(Protocol):
    """Knows which tools the clients of orgs may use."""

    async def tool_lists(self, org_id: str) -> ToolLists:
        """Those of an org."""
        ...


class NoLists:
    """Every tool may be used."""

    async def tool_lists(self, org_id: str) -> ToolLists:
        return ToolLists()


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool, over. It has no arguments and no result. ``plugin`` and ``server`` are empty if there is no
    such tool; ``actor`` is who called."""

    org_id: str
    actor: str
    plugin: str
    server: str
    tool: str
    outcome: Outcome
    ms: float
    request: str


class Audit(Protocol):
    """Keeps word of every call of a tool."""

    def record(self, call: ToolCall) -> None:
        """``call`` is over."""
        ...


class LogAudit:
    """The host's log is the audit."""

    def record(self, call: ToolCall) -> None:
        fields: dict[str, Any] = {"plugin": call.plugin, "org": call.org_id, "request": call.request}
        fields |= {"actor": call.actor, "server": call.server, "tool": call.tool[:200]}
        get_logger().info("mcp tool call", **fields, outcome=call.outcome, ms=call.ms)
