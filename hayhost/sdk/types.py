"""The shapes that cross between plugin and host."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Required, TypeAlias, TypedDict

__all__ = [
    "JSON",
    "AuthState",
    "Capability",
    "ConfigFieldDescriptor",
    "ConfigFieldReference",
    "ConfigFieldType",
    "HTTPMethod",
    "McpTool",
    "Org",
    "PageSlot",
]

JSON: TypeAlias = "dict[str, Any] | list[Any] | str | int | float | bool | None"
Capability = Literal["routes", "mcp", "auth", "config", "ui"]
ConfigFieldType = Literal["string", "number", "boolean", "json"]
HTTPMethod = Literal["GET", "POST", "PUT", "PATCH", "DELETE"]
PageSlot = Literal["standalone", "after-settings", "before-settings"]


class ConfigFieldDescriptor(TypedDict, total=False):
    """One field of a plugin's config schema; only ``type`` is required."""

    type: Required[ConfigFieldType]
    label: str
    description: str
    placeholder: str
    required: bool
    env: str
    sensitive: bool
    default: Any


class McpTool(TypedDict, total=False):
    """A tool as an MCP server lists it; further keys are passed on untouched."""

    name: Required[str]
    description: str
    inputSchema: dict[str, Any]
    serverId: str


@dataclass(frozen=True, slots=True)
class ConfigFieldReference:
    """Names a registered config field, so that a descriptor can point at its value without holding it."""

    name: str


@dataclass(frozen=True, slots=True)
class Org:
    """The organisation that a worker serves."""

    id: str
    name: str


@dataclass(frozen=True, slots=True)
class AuthState:
    """The credentials an org connected the plugin with; their values never show in a ``repr``."""

    method_id: str
    credentials: Mapping[str, Any] = field(repr=False)
