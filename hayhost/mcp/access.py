"""Who may use which tools, and who did."""

from collections.abc import Mapping
from typing import Any, Literal, Protocol

import msgspec

from hayhost.catalog import Plugin
from hayhost.installs import ToolLists
from hayhost.logs import get_logger

__all__ = ["Audit", "CountedAudit", "LogAudit", "NoLists", "Outcome", "StoreAudit", "ToolCall", "ToolPolicy"]

Outcome = Literal["ok", "tool error", "error", "denied", "refused", "unavailable", "timeout", "cancelled"]


class ToolPolicy(Protocol):
    """Knows which tools the clients of orgs may use."""

    def known(self, org_id: str) -> ToolLists | None:
        """Those of an org; ``None`` if they have to be asked for with ``tool_lists``."""
        ...

    async def tool_lists(self, org_id: str) -> ToolLists:
        """Those of an org. Raises ``StoreError``."""
        ...


class NoLists:
    """Every tool may be used: there is no store that would say otherwise."""

    def known(self, org_id: str) -> ToolLists | None:
        return ToolLists()

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


class CountedAudit:
    """``audit``, and the metrics of ``plugins``."""

    def __init__(self, audit: Audit, plugins: Mapping[str, Plugin]) -> None:
        self._audit = audit
        self._plugins = plugins

    def record(self, call: ToolCall) -> None:
        self._audit.record(call)
        if (plugin := self._plugins.get(call.plugin)) is not None:
            plugin.counts.tool(call.tool if call.server else "", call.outcome.replace(" ", "_"), call.ms / 1000)


class LogAudit:
    """The host's log is the audit."""

    def record(self, call: ToolCall) -> None:
        fields: dict[str, Any] = {"plugin": call.plugin, "org": call.org_id, "request": call.request}
        fields |= {"actor": call.actor, "server": call.server, "tool": call.tool[:200]}
        get_logger().info("mcp tool call", **fields, outcome=call.outcome, ms=call.ms)


class Calls(Protocol):
    """The part of a store's audit log that has calls of tools."""

    def note_call(self, actor: str, org: str, plugin: str | None, outcome: str, details: Mapping[str, Any]) -> None: ...


class StoreAudit:
    """The store's audit log has the calls, a moment later."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def record(self, call: ToolCall) -> None:
        details = {"server": call.server, "tool": call.tool, "ms": call.ms, "request": call.request}
        self._calls.note_call(call.actor, call.org_id, call.plugin or None, call.outcome, details)
