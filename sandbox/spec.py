"""What the front dills for a zygote. It has no org's data in it."""

from dataclasses import dataclass

from .confinement.plan import UNCONFINED, Plan

__all__ = ["PluginSpec"]


@dataclass(frozen=True, slots=True)
class PluginSpec:
    """What the front knows of a plugin from its manifest, and a child needs to load it."""

    folder: str
    entry: str
    attribute: str | None
    name: str
    version: str
    capabilities: tuple[str, ...]
    env: tuple[str, ...]
    subprocess: tuple[str, ...]
    """The commands that the manifest lets stdio MCP servers run."""
    hook_timeout: float
    instrument: bool = False
    plan: Plan = UNCONFINED
    strict: bool = False
    """Whether each worker is to be a program of its own, not a fork."""
    tracing: bool = False
    """Whether its workers' spans are wanted."""
