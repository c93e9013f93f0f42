"""All attacks, by name. Imports nothing but the standard library: it runs in a confined worker."""

from . import (
    at_import,
    crossorg,
    crossorg_scratch,
    crossorg_signs,
    files_content,
    files_metadata,
    kernel,
    network,
    processes,
    protocol,
    resources,
    resources_memory,
)
from .harness import ATTACKS, Attack, perform

__all__ = [
    "ATTACKS",
    "Attack",
    "at_import",
    "crossorg",
    "crossorg_scratch",
    "crossorg_signs",
    "files_content",
    "files_metadata",
    "kernel",
    "network",
    "perform",
    "processes",
    "protocol",
    "resources",
    "resources_memory",
]
