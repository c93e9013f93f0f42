"""Control groups: what all processes of one worker together may take of the machine (cgroups(7), versions 1 and 2).

The front makes and removes them; a worker never sees them. Below the front's own group there is one of the host's, and
in it one per worker. Version 2 gives a group controllers only if it has no processes of its own, so the front moves
itself into a leaf first.
"""

import errno
import os
import signal
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final

__all__ = ["Cgroups", "find"]

_CONTROLLERS: Final = ("memory", "pids", "cpu")
_PERIOD: Final = 100_000
_AGAIN: Final = 0.01


class Cgroups:
    """The groups of this host's workers. ``folders`` are where they are made: one, or one per controller."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.version = 2 if "unified" in folders else 1

    def add(self, name: str, pid: int, *, memory: int, processes: int, processors: float) -> None:
        """Put process ``pid`` into a new group ``name``. Sizes in bytes. Raises ``OSError``."""
        quota = max(1000, int(processors * _PERIOD))
        if self.version == 2:
            _make(
                self.folders["unified"] / name,
                pid,
                {
                    "memory.max": memory,
                    "memory.swap.max": 0,
                    "memory.oom.group": 1,
                    "pids.max": processes,
                    "cpu.max": f"{quota} {_PERIOD}",
                },
                optional={"memory.swap.max", "memory.oom.group"},
            )
            return
        _make(
            self.folders["memory"] / name,
            pid,
            {"memory.limit_in_bytes": memory, "memory.memsw.limit_in_bytes": memory},
            optional={"memory.memsw.limit_in_bytes"},
        )
        _make(self.folders["pids"] / name, pid, {"pids.max": processes})
        _make(self.folders["cpu"] / name, pid, {"cpu.cfs_period_us": _PERIOD, "cpu.cfs_quota_us": quota})

    def ran_out(self, name: str) -> bool:
        """Whether a process of group ``name`` was killed because the group had used up its memory."""
        file = "memory.events" if self.version == 2 else "memory.oom_control"
        folder = self.folders["unified" if self.version == 2 else "memory"]
        try:
            fields = (folder / name / file).read_text().split()
        except OSError:
            return False
        return any(key == "oom_kill" and count != "0" for key, count in zip(fields[::2], fields[1::2], strict=False))

    def remove(self, name: str) -> bool:
        """Kill what is left in group ``name``, and remove it; ``False`` while a process is in it all the same."""
        gone = True
        for folder in self.folders.values():
            try:
                os.rmdir(folder / name)
            except FileNotFoundError:
                pass
            except OSError:
                gone = False
                _kill(folder / name)
        return gone

    def close(self, patience: float = 0.0) -> None:
        """Remove the host's own groups, and what is left below them.

        Workers that were killed just now keep theirs for some milliseconds: ``patience`` is how many seconds to wait.
        """
        deadline = time.monotonic() + patience
        left = set(self.folders.values())
        while left := {folder for folder in left if not _remove(folder)}:
            if time.monotonic() >= deadline:
                return
            time.sleep(_AGAIN)


def _remove(folder: Path) -> bool:
    """Remove ``folder`` and the groups below it, as far as no process is left in them; whether all are gone."""
    try:
        below = [folder / entry.name for entry in os.scandir(folder) if entry.is_dir()]
    except OSError:
        return True  # there is none, or none of ours
    for path in (*below, folder):
        try:
            os.rmdir(path)
        except OSError:
            continue  # a process that does not die keeps its group, and nobody else's
    return not folder.exists()


def _kill(folder: Path) -> None:
    try:
        for pid in (folder / "cgroup.procs").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    except OSError:
        pass  # gone meanwhile; whoever is not is killed the next time


def _make(folder: Path, pid: int, values: dict[str, object], optional: Collection[str] = ()) -> None:
    os.mkdir(folder)
    for file, value in values.items():
        try:
            _write(folder / file, value)
        except OSError:
            if file not in optional:
                raise
    _write(folder / "cgroup.procs", pid)


def _write(path: Path, value: object) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.write(descriptor, str(value).encode())
    finally:
        os.close(descriptor)


def find(name: str, pid: int) -> Cgroups:
    """The groups below those of process ``pid``, in a new group ``name``, which is ``PREFIX-PID-...``.

    Raises ``OSError`` saying what is missing.
    """
    own = _own(pid)
    mounts = _mounts()
    prefix = name.partition("-")[0]
    if all(controller in own and controller in mounts for controller in _CONTROLLERS):
        parents = {controller: mounts[controller] / own[controller] for controller in _CONTROLLERS}
        for parent in parents.values():
            _sweep(parent, prefix)
        return _version_1(parents, name)
    if "unified" not in mounts:
        raise OSError(errno.ENOENT, "no cgroup file system with memory, pids and cpu is mounted")
    parent = mounts["unified"] / own.get("unified", "")
    _sweep(parent, prefix)
    return _version_2(parent, name, pid)


def _sweep(parent: Path, prefix: str) -> None:
    """Remove the groups of hosts that were killed: ``PREFIX-PID-...`` of a process that is no more."""
    for folder in parent.glob(f"{prefix}-*-*"):
        pid = folder.name.split("-")[1]
        if pid.isdigit() and not os.path.exists(f"/proc/{pid}"):
            Cgroups({"unified": folder}).close()


def _version_1(parents: dict[str, Path], name: str) -> Cgroups:
    cgroups = Cgroups({controller: parent / name for controller, parent in parents.items()})
    try:
        for folder in cgroups.folders.values():
            os.mkdir(folder)
    except OSError:
        cgroups.close()
        raise
    return cgroups


def _version_2(parent: Path, name: str, pid: int) -> Cgroups:
    missing = set(_CONTROLLERS) - set((parent / "cgroup.controllers").read_text().split())
    if missing:
        raise OSError(errno.ENOENT, f"the cgroup {parent} is not given the controllers {', '.join(sorted(missing))}")
    folder = parent / name
    enable = " ".join(f"+{controller}" for controller in _CONTROLLERS)
    try:
        os.mkdir(folder)
        try:
            _write(parent / "cgroup.subtree_control", enable)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            front = parent / f"{name}-front"
            front.mkdir(exist_ok=True)
            _write(front / "cgroup.procs", pid)
            _write(parent / "cgroup.subtree_control", enable)
        _write(folder / "cgroup.subtree_control", enable)
    except OSError:
        Cgroups({"unified": folder}).close()
        raise
    return Cgroups({"unified": folder})


def _own(pid: int) -> dict[str, str]:
    groups = {}
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(",") if controllers else ["unified"]:
            groups[controller] = path.lstrip("/")
    return groups


def _mounts() -> dict[str, Path]:
    mounts: dict[str, Path] = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2":
            mounts.setdefault("unified", Path(before.split()[4]))
        elif kind == "cgroup":
            for option in options.split(","):
                mounts.setdefault(option, Path(before.split()[4]))
    return mounts
