"""What a worker takes of the machine, looked at from outside now and then where no cgroup bounds it.

It bounds what lasts: more processes and threads or memory than a plugin may have, for two looks in a row, ends the
worker; more than one processor's time keeps it on one of them until it is calm again. What is over sooner nobody sees.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Final

from sandbox.confinement import Plan

__all__ = ["Overuse"]

_TICKS: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_BUSY: Final = 1.2
"""Processors; some more than one, as the kernel's clock is coarse."""
_CALM: Final = 0.5


@dataclass(slots=True)
class _Seen:
    born: int
    spent: int
    at: float
    over: bool = False
    pinned: bool = False


@dataclass(slots=True)
class _Stat:
    """Of /proc/PID/stat (proc_pid_stat(5)): what a process is and takes."""

    born: int
    spent: int
    threads: int
    resident: int


@dataclass
class Overuse:
    """Remembers what workers took at the last look. One look at a time, from any thread."""

    processors: set[int] = field(default_factory=lambda: os.sched_getaffinity(0))
    """Those that workers may be kept on."""

    def __post_init__(self) -> None:
        self._seen: dict[int, _Seen] = {}
        self._next: Iterator[int] = cycle(sorted(self.processors))

    def forget(self, living: Iterable[int]) -> None:
        """Remember nothing of processes but those with the ids ``living``."""
        self._seen = {pid: self._seen[pid] for pid in living if pid in self._seen}

    def look(self, workers: Mapping[int, Plan]) -> dict[int, str]:
        """Look at the processes with these ids: why they have to be ended, for those that have."""
        found = {}
        for pid, plan in workers.items():
            try:
                if problem := self._look(pid, plan):
                    found[pid] = problem
            except (OSError, ValueError, IndexError):
                self._seen.pop(pid, None)  # it is gone, or going
        return found

    def _look(self, pid: int, plan: Plan) -> str:
        pids = [pid, *(_below(pid) if plan.programs else ())]
        stats = [stat for pid in pids if (stat := _stat(pid)) is not None]
        born, spent, now = stats[0].born, sum(stat.spent for stat in stats), time.monotonic()
        seen = self._seen.get(pid)
        if seen is None or seen.born != born:
            seen = self._seen[pid] = _Seen(born, spent, now)
        problem = _problem(pids, stats, plan)
        if problem and seen.over:
            return problem
        seen.over = bool(problem)
        if now > seen.at:
            self._share(pids, seen, (spent - seen.spent) / _TICKS / (now - seen.at))
        seen.spent, seen.at = spent, now
        return ""

    def _share(self, pids: list[int], seen: _Seen, processors: float) -> None:
        """Keep the processes on one processor while they would take more."""
        if processors > _BUSY and len(self.processors) > 1:
            seen.pinned = True
            _pin(pids, {next(self._next)})
        elif seen.pinned and processors < _CALM:
            seen.pinned = False
            _pin(pids, self.processors)


def _problem(pids: list[int], stats: list[_Stat], plan: Plan) -> str:
    if (count := sum(stat.threads for stat in stats)) > plan.processes:
        used = f"it had {count} processes and threads, more than its {plan.processes}"
        return f"{used}; permissions.processes in the manifest can ask for more"
    if sum(stat.resident for stat in stats) > plan.memory and sum(map(_memory, pids)) > plan.memory:
        used = f"it used more than its {plan.memory >> 20} MiB of memory"
        return f"{used}; permissions.memory in the manifest can ask for more"
    return ""


def _stat(pid: int) -> _Stat | None:
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fields = os.read(descriptor, 4096).rpartition(b") ")[2].split()
        finally:
            os.close(descriptor)
    except OSError:
        return None
    return _Stat(int(fields[19]), int(fields[11]) + int(fields[12]), int(fields[17]), int(fields[21]) * _PAGE)


def _memory(pid: int) -> int:
    """Bytes that are a process's own, or its share of those that it has in common with others: its zygote's, mostly.

    Who keeps the front from looking is counted with all that is resident.
    """
    try:
        rows = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        stat = _stat(pid)
        return stat.resident if stat else 0
    sizes = dict(row.split(":", 1) for row in rows[1:])
    return sum(int(sizes[name].split()[0]) for name in ("Pss_Anon", "Pss_Shmem", "SwapPss") if name in sizes) << 10


def _below(pid: int) -> Iterator[int]:
    """The processes that a process has started, and those that they have."""
    parents = [pid]
    while parents:
        parent = parents.pop()
        for task in _tasks(parent):
            try:
                children = [*map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())]
            except OSError:
                continue  # gone, or a kernel that does not say
            yield from children
            parents += children


def _tasks(pid: int) -> list[int]:
    try:
        return [int(name) for name in os.listdir(f"/proc/{pid}/task")]
    except OSError:
        return []


def _pin(pids: list[int], processors: set[int]) -> None:
    for _ in range(2):  # what was started meanwhile may have been started by one that was still free
        for pid in pids:
            for task in _tasks(pid):
                try:
                    os.sched_setaffinity(task, processors)
                except OSError:
                    pass  # gone
