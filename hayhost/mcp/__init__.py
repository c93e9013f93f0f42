"""MCP endpoints: an org's MCP servers, of one plugin or of all, for any MCP client."""

from .access import Audit, CountedAudit, LogAudit, NoLists, StoreAudit, ToolCall, ToolPolicy
from .gateway import METADATA_PATH, METHODS, Gateway

__all__ = [
    "METADATA_PATH",
    "METHODS",
    "Audit",
    "CountedAudit",
    "Gateway",
    "LogAudit",
    "NoLists",
    "StoreAudit",
    "ToolCall",
    "ToolPolicy",
]
