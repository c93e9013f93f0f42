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
    network_programs,
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
    "network_programs",
    "perform",
    "processes",
    "protocol",
    "resources",
    "resources_memory",
]
