"""The agent of a storm: a schedule made from a seed, and the hands that carry it out."""

import asyncio
import os
import random
import signal
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, NamedTuple

from tests.conftest import HostProcess
from tests.storing import sql

from .plugin import BROKEN, save_version
from .processes import Process, family

__all__ = ["Agent", "Fault", "schedule"]


class Fault(NamedTuple):
    """What is done, in seconds after the start; ``pick`` chooses its victim among those there are then."""

    at: float
    kind: str
    pick: float
    seconds: float


# How often each is done, as against the others.
KINDS: Final = {
    "kill worker": 20,
    "kill workers": 3,
    "kill zygote": 5,
    "kill keeper": 1,
    "kill nursery": 1.5,
    "kill watcher": 2,
    "kill broker": 2,
    "stop worker": 8,
    "stop zygote": 2,
    "stop nursery": 1,
    "stop watcher": 1,
    "stop broker": 2,
    "starve worker": 4,
    "starve all": 2,
    "lock database": 3,
    "save": 6,
    "save broken": 2,
    "rollback": 1,
}


def schedule(seed: int, seconds: float, rate: float) -> list[Fault]:
    """The faults of a run of ``seconds``, ``rate`` a second: the same for the same arguments."""
    chance = random.Random(seed)
    faults, at = [], 0.0
    while (at := at + chance.expovariate(rate)) < seconds:
        [kind] = chance.choices(list(KINDS), list(KINDS.values()))
        faults.append(Fault(at, kind, chance.random(), chance.uniform(0.1, 2.5)))
    return faults


class Agent:
    """Carries out a schedule on a host."""

    def __init__(self, host: HostProcess, plugins: list[Path], store: str) -> None:
        self.done: Counter[str] = Counter()
        self.seen: set[Process] = set()
        """Every process that there ever was below the host."""
        self.version = 0
        """Of the plugins, as last saved."""
        self.versions = dict.fromkeys((folder.name for folder in plugins), 0)
        self._host = host
        self._plugins = plugins
        self._store = store
        self._under_way: set[asyncio.Task[None]] = set()
        self._rolled_back: set[Path] = set()
        self._hands: dict[str, Callable[[Fault, str], Awaitable[None]]] = {
            "kill": self._kill,
            "stop": self._stop,
            "starve": self._starve,
            "lock": self._lock,
            "save": self._save,
            "rollback": self._rollback,
        }

    def look(self) -> list[Process]:
        """The processes below the host now."""
        found = family(self._host.pid)
        self.seen.update(found)
        return found

    async def run(self, faults: list[Fault]) -> None:
        """Carry out ``faults``, each at its time. Leaves nothing stopped, locked or starving."""
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            for fault in faults:
                await asyncio.sleep(max(0.0, began + fault.at - loop.time()))
                verb, _, noun = fault.kind.partition(" ")
                task = loop.create_task(self._do(self._hands[verb], fault, noun))
                self._under_way.add(task)
                task.add_done_callback(self._under_way.discard)
        finally:
            await self.calm()

    async def _do(self, hand: Callable[[Fault, str], Awaitable[None]], fault: Fault, noun: str) -> None:
        await hand(fault, noun)
        self.done[fault.kind] += 1

    async def calm(self) -> None:
        """Wait for what is under way; plugins that were rolled back are saved once more.

        No others are: a reload would make good again what went wrong with a worker before.
        """
        await asyncio.gather(*self._under_way)
        for folder in self._rolled_back:
            self._save_next(folder)

    def save_all(self) -> None:
        """Give every plugin another version."""
        for folder in self._plugins:
            self._save_next(folder)

    def _victims(self, role: str, fault: Fault, share: float = 0.0) -> list[int]:
        pids = sorted(process.pid for process in self.look() if process.role == role)
        if not pids:
            return []
        first = int(fault.pick * len(pids))
        return (pids[first:] + pids[:first])[: max(1, int(share * len(pids)))]

    async def _kill(self, fault: Fault, noun: str) -> None:
        victims = self._victims("worker", fault, 0.3) if noun == "workers" else self._victims(noun, fault)
        for pid in victims:
            _signal(pid, signal.SIGKILL)

    async def _stop(self, fault: Fault, noun: str) -> None:
        for pid in self._victims(noun, fault):
            _signal(pid, signal.SIGSTOP)
            await asyncio.sleep(fault.seconds)
            _signal(pid, signal.SIGCONT)

    async def _starve(self, fault: Fault, noun: str) -> None:
        """Give a worker next to no time of the processor, or everybody less of it."""
        if noun == "all":
            spin = "import sys, time\nend = time.monotonic() + float(sys.argv[1])\nwhile time.monotonic() < end: pass"
            count = os.cpu_count() or 1
            spinning = [
                await asyncio.create_subprocess_exec(sys.executable, "-ISc", spin, str(fault.seconds / 2))
                for _ in range(count)
            ]
            for process in spinning:
                await process.wait()
            return
        for pid in self._victims("worker", fault):
            for _ in range(int(fault.seconds / 0.1)):
                _signal(pid, signal.SIGSTOP)
                await asyncio.sleep(0.095)
                _signal(pid, signal.SIGCONT)
                await asyncio.sleep(0.005)

    async def _lock(self, fault: Fault, _noun: str) -> None:
        """SQLite: be another process that writes, for long. PostgreSQL: end all connections of the host."""
        if self._store.startswith("postgresql"):
            ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'hayhost'"
            await asyncio.to_thread(asyncio.run, sql(self._store, ended))
        else:
            await asyncio.to_thread(_hold_lock, self._store.removeprefix("sqlite:///"), fault.seconds)

    async def _save(self, fault: Fault, noun: str) -> None:
        folder = self._plugins[int(fault.pick * len(self._plugins))]
        if noun == "broken":
            save_version(folder, BROKEN)
            await asyncio.sleep(fault.seconds)
        self._save_next(folder)

    def _save_next(self, folder: Path) -> None:
        self.version += 1
        self.versions[folder.name] = self.version
        save_version(folder, f"VERSION = {self.version}\n")

    async def _rollback(self, fault: Fault, _noun: str) -> None:
        folder = self._plugins[int(fault.pick * len(self._plugins))]
        self._rolled_back.add(folder)
        await asyncio.to_thread(self._host.post, f"/api/v1/plugins/{folder.name}/rollback")


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def _hold_lock(file: str, seconds: float) -> None:
    connection = sqlite3.connect(file, timeout=30, isolation_level=None)
    try:
        connection.execute("BEGIN IMMEDIATE")
        time.sleep(seconds)
        connection.execute("ROLLBACK")
    finally:
        connection.close()
