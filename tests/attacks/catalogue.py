"""What is known about the attacks beyond their code: where they cannot work at all, what still does, who stops them."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from .plugin.attack_code import ATTACKS, Attack

__all__ = [
    "ATTACKS",
    "CONTENDED",
    "FAMILIES",
    "IMPOSSIBLE",
    "LAYERS",
    "LEVELS",
    "MATRIX",
    "RESIDUAL",
    "SUBSET",
    "Attack",
    "load_matrix",
    "may_fail_unconfined",
    "only_stopper",
    "stopped_by",
]

FAMILIES: Final = ("files", "network", "processes", "kernel", "resources", "protocol", "crossorg")
LEVELS: Final = ("none", "limited", "confined", "namespaced", "hardened")
LAYERS: Final = ("limits", "landlock", "seccomp", "namespaces", "cgroups", "uid", "inspection")
MATRIX: Final = Path(__file__).with_name("matrix.json")

_NO_FAMILY = "the kernel may have been built without this family of sockets"
_NO_CALL = "the kernel may have been built without this call"
IMPOSSIBLE: Final = {
    "signal-timer": "the kernel lets a timer signal threads of its own process only",
    "oom-score-own": "needs CAP_SYS_RESOURCE, which not even root has everywhere",
    "limits-raised": "needs CAP_SYS_RESOURCE if there are limits already",
    "memory-limit-raised": "needs CAP_SYS_RESOURCE if there are limits already",
    "core-dump": "needs CAP_SYS_RESOURCE if there are limits already",
    "read-inherited-descriptors": "the host leaves no file open",
    "other-abi-x32": _NO_CALL,
    "other-abi-32": _NO_CALL,
    "other-abi-32-socket": _NO_CALL,
    "socket-inet-ping": "only for the groups of a setting of the kernel",
    "crypto-bind": _NO_FAMILY,
    "read-attribute": "not every file system has extended attributes",
    "read-attribute-at": _NO_CALL,
    "change-attribute": "not every file system has extended attributes",
    "change-attribute-at": _NO_CALL,
    "remove-attribute": "not every file system has extended attributes",
    "list-attributes": "not every file system has extended attributes",
    "change-own-attribute": "not every file system has extended attributes",
    "sign-by-attribute": "not every file system has extended attributes",
    "scratch-immutable": "not every file system has flags",
    "page-cache-reading": "not every file system can read without waiting",
    "change-own-flags": "not every file system has flags",
    "debug-me": "only once, and only if nobody debugs it already",
    "perf-event": "a setting of the kernel may keep ordinary users from it",
    "events-of-another": "a setting of the kernel may keep ordinary users from it",
    "userfaultfd": "a setting of the kernel may keep ordinary users from it",
    "load-library-elsewhere": "the libraries may not be there",
    "link-peer-pidfd": _NO_CALL,
    "files-open": "the host may have been given fewer descriptors than that",
    "watchers-many": "the host may have been given fewer descriptors than that",
    **dict.fromkeys(
        (
            "quota",
            "quota-descriptor",
            "module-load",
            "module-load-file",
            "module-unload",
            "kernel-load",
            "kernel-load-file",
            "shadow-stack",
            "directory-cookie",
            "library-use",
            "io-ports",
            "io-privilege",
            "protection-keys",
            "memory-secret",
            "mount-list",
            "mount-details",
            "mount-tree-attributes",
            "security-modules",
            "page-cache",
            "change-mode-2",
            "change-mode-descriptor",
            "file-systems",
            "local-descriptors",
            "namespace-time",
            "numa-policy",
            "numa-policy-default",
            "pages-move",
            "resources-compare",
        ),
        _NO_CALL,
    ),
    **{
        name: _NO_FAMILY
        for name in ATTACKS
        if name.startswith("socket-") and "unix" not in name and name[7:11] != "inet"
    },
    "socket-inet-sctp": _NO_FAMILY,
    "socket-inet-dccp": _NO_FAMILY,
    "socket-inet-udplite": _NO_FAMILY,
    "socket-inet-mptcp": _NO_FAMILY,
    "mptcp-connect": _NO_FAMILY,
}
"""Attacks that may fail without any confinement, and why. All others must succeed then: so their tests can fail."""

CONTENDED: Final = {"cpu-all": "needs processors that nobody else uses just then"}
"""Attacks whose success depends on what else the machine does."""

_PATHS = "neither Landlock nor a filter of system calls sees the path; a root of its own does not have the file"
_MOMENT = "without cgroups the host looks twice a second: what is over within a second only its address space limits"
_OWN_FILES = "all workers of a plugin share its files, and the kernel keeps locks of those that are open for reading"
RESIDUAL: Final[dict[str, tuple[str, str]]] = {
    "stat-file": ("namespaced", _PATHS),
    "statx-file": ("namespaced", _PATHS),
    "stat-descriptor": ("namespaced", _PATHS),
    "stat-file-system": ("namespaced", _PATHS),
    "read-link": ("namespaced", _PATHS),
    "read-link-descriptor": ("namespaced", _PATHS),
    "access-file": ("namespaced", _PATHS),
    "access-file-2": ("namespaced", _PATHS),
    "exists-by-error": ("namespaced", _PATHS),
    "change-directory": ("namespaced", _PATHS),
    "files-many": ("namespaced", "without a file system of its own, a scratch folder has no limit of files"),
    "disk-many-files": ("namespaced", "without a file system of its own, only the size of each file is limited"),
    "disk-removed-files": ("namespaced", "without a file system of its own, only the size of each file is limited"),
    "threads-many": ("hardened", _MOMENT),
    "memory-shared": ("hardened", _MOMENT),
    "load-library-elsewhere": ("", "the system's libraries are there to be loaded"),
    "make-setuid": ("", "in its own folder, which no other user can enter and where such bits have no effect"),
    "open-scratch": ("", "its own folder may be opened to all, but nobody else gets as far as to it"),
    "create-own-pipe": ("", "a pipe in its own folder leads nowhere"),
    "signal-descriptor": ("", "it is told of its own signals only"),
    "folders-deep": ("", "its own folder is taken apart however deep it is"),
    "locks-many": ("", "locks on files in its own folder bind nobody else"),
    "memory-passed": ("", "bounded by its number of descriptors"),
    "memory-mappings": ("", "bounded by the kernel's own limit of mappings, and counted as the cgroup's memory"),
    "page-cache-mincore": ("", "whether a file that may be read is in memory can be seen from the time it takes, too"),
    "sign-by-futex": ("", "a thread may wait for any memory that it may read, and files of the plugin are such memory"),
    "page-cache-reading": ("", "whether a file that may be read is in memory can be seen from the time it takes, too"),
    "sign-by-lock": ("", _OWN_FILES),
    "sign-by-record-lock": ("", _OWN_FILES),
    "sign-by-lock-elsewhere": ("", _OWN_FILES),
}
"""Attacks that work below a level of isolation (or at all: an empty one), and why. What is not here must be stopped."""

SUBSET: Final = (
    "read-file",
    "write-file",
    "change-mode",
    "execute-memory",
    "read-link",
    "tcp-connect",
    "udp-send",
    "unix-connect",
    "abstract-connect",
    "pair-send",
    "memory-read",
    "signal-kill",
    "signal-owner",
    "priority-of-another",
    "fork-plain",
    "io-uring",
    "namespace-user",
    "memory-shared-kept",
    "memory-files",
    "files-open",
    "import-memory",
    "leave-segment",
    "leave-tmp",
    "kill-peer",
    "read-peer-scratch",
    "threads-many",
    "threads-kept",
    "chroot",
)
"""Attacks that stand for their kind where all would take too long."""


def may_fail_unconfined(attack: Attack) -> str:
    """Why an attack may fail although nothing is confined; empty if it may not."""
    if attack.host:
        return "the host withstands it by itself"
    if attack.root and os.getuid():
        return "an ordinary user may not do it"
    return IMPOSSIBLE.get(attack.name) or CONTENDED.get(attack.name, "")


def load_matrix() -> dict[str, Any]:
    """The measured outcomes; see ``matrix.py``. Empty if nothing was measured yet."""
    return json.loads(MATRIX.read_text()) if MATRIX.exists() else {}


def stopped_by(outcomes: dict[str, str]) -> Iterator[str]:
    """The layers that alone stop an attack which works without any."""
    if outcomes.get("none") == "succeeded":
        yield from (layer for layer in LAYERS if outcomes.get(layer, "succeeded") != "succeeded")


def only_stopper(outcomes: dict[str, str]) -> str:
    """The layer without which the attack works, if there is exactly one."""
    found = [layer for layer in LAYERS if outcomes.get(f"without-{layer}") == "succeeded"]
    return found[0] if len(found) == 1 and outcomes.get("all") != "succeeded" else ""
