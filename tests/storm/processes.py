"""The processes of a host by what they are, and what the machine says of them."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

__all__ = ["Process", "Sample", "family", "kinds", "living", "sample"]


class Process(NamedTuple):
    """A process below a host. Its start tells it from a later one with the same number."""

    pid: int
    started: int
    role: str


class Sample(NamedTuple):
    """What a host takes of the machine at a moment: KiB of memory, descriptors and threads of the front; processes.

    Descriptors of the store's files are not counted: there is a pool of connections, each made when it is needed.
    """

    memory: int
    descriptors: int
    threads: int
    processes: int


def _stat(pid: int) -> tuple[str, str, int, int] | None:
    """Name, state, parent and start of a process."""
    try:
        head, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    except OSError:
        return None
    fields = rest.split()
    return head.partition("(")[2], fields[0], int(fields[1]), int(fields[19])


def family(host: int) -> list[Process]:
    """All processes below the host: ``nursery``, ``watcher``, ``broker``, ``keeper``, ``zygote`` or ``worker``."""
    seen = {int(entry): stat for entry in os.listdir("/proc") if entry.isdigit() and (stat := _stat(int(entry)))}
    children: dict[int, list[int]] = {}
    for pid, (_, _, parent, _) in seen.items():
        children.setdefault(parent, []).append(pid)
    found, front = [], [host]
    while front:
        above = front.pop()
        for pid in children.get(above, ()):
            front.append(pid)
            name, state, _, started = seen[pid]
            if state not in "ZX":
                found.append(Process(pid, started, _role(pid, name, seen[above][0] if above in seen else "")))
    return found


def _role(pid: int, name: str, parent: str) -> str:
    if name in ("hay-nursery", "hay-keeper"):
        return name.removeprefix("hay-")
    if name.startswith("hay:"):
        return "worker" if parent.startswith("hay:") else "zygote"
    try:
        command = Path(f"/proc/{pid}/cmdline").read_text()
    except OSError:
        return "other"
    return next((role for role in ("watcher", "broker") if role in command), "other")


def living(processes: set[Process]) -> list[Process]:
    """Those that have not ended."""
    found = []
    for process in processes:
        stat = _stat(process.pid)
        if stat is not None and stat[1] not in "ZX" and stat[3] == process.started:
            found.append(process)
    return found


def kinds(host: int) -> list[str]:
    """What each of the front's descriptors is; nothing, unless we are root: nobody else may look there."""
    found = []
    with contextlib.suppress(PermissionError):
        for entry in os.listdir(f"/proc/{host}/fd"):
            with contextlib.suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{host}/fd/{entry}").partition(":[")[0])
    return sorted(kind for kind in found if "/store.db" not in kind)


def sample(host: int, below: int) -> Sample:
    """Of the host, which has ``below`` processes below it."""
    status = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{host}/status").read_text().splitlines() if ":\t" in line
    )
    return Sample(int(status["VmRSS"].split()[0]), len(kinds(host)), int(status["Threads"]), below)
