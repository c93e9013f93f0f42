"""A storm from its beginning to its end, and what must hold meanwhile and afterwards."""

import asyncio
import contextlib
import json
import os
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.conftest import HostProcess, wait_until
from tests.storing import server

from .agent import Agent, schedule
from .load import CANARY, SECRET, Clients, Tenant, Violations
from .plugin import write
from .processes import Process, Sample, kinds, living, sample

__all__ = ["Plan", "Report", "storm"]

# In calm everybody is well again within this many seconds, or as many times what it takes when all is killed at once.
_CALM: Final = 5.0
_TIMES: Final = 3.0
_TOGETHER: Final = 16
# What a thing that is bounded may still differ by: an allocator's caches, connections that are just being closed.
_MORE_MEMORY: Final = 24 << 10
_MORE: Final = 12
# The store's pool has so many at most.
_CONNECTIONS: Final = 8
# The front has its socket, its output, its pidfd and its broker's socket.
_OF_A_WORKER: Final = 4


class Plan(NamedTuple):
    """How large a storm is. ``rate`` is faults a second."""

    seed: int
    seconds: float
    orgs: int
    plugins: int
    clients: int = 24
    rate: float = 1.5
    backend: str = "sqlite"


class Report(NamedTuple):
    """What came of it."""

    violations: list[str]
    statuses: dict[str, int]
    faults: dict[str, int]
    recovery: float
    allowed: float
    thirds: list[tuple[float, ...]]
    log: Path | None


class _Storm:
    def __init__(self, plan: Plan, folder: Path, say: Callable[[str], None]) -> None:
        self.plan = plan
        self.folder = folder
        self.say = say
        self.violations = Violations()
        self.samples: list[Sample] = []
        self.last: dict[Tenant, Any] = {}
        self.store = server().new() if plan.backend == "postgresql" else f"sqlite:///{folder / 'store.db'}"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        self.temporary.chmod(0o1777)
        self.plugins = [f"p{number}" for number in range(plan.plugins)]
        self.tenants = [Tenant(org, name, plan.seed) for org in range(plan.orgs) for name in self.plugins]
        self.recovery = 0.0
        self.allowed = 0.0
        self.agent: Agent

    async def run(self) -> Report:
        plan = self.plan
        async with _echoing() as port:
            folders = [write(self.folder / "plugins", name, port) for name in self.plugins]
            async with Clients(self.tenants, plan.seed, self.violations, port) as clients:
                with self._hosting() as host:
                    clients.port = host.port
                    self.agent = Agent(host, folders, self.store)
                    await self._storm(host, clients)
                    log = self._keep(host)
                with self._hosting() as host:  # once more, on what the first has left
                    clients.port = host.port
                    await self._each(clients.read_back, "reads its settings after a restart")
                    await self._end(host)
        return Report(
            self.violations.told,
            dict(sorted(clients.statuses.items())),
            dict(sorted(self.agent.done.items())),
            self.recovery,
            self.allowed,
            _thirds(self.samples),
            log,
        )

    @contextlib.contextmanager
    def _hosting(self) -> Iterator[HostProcess]:
        options = {
            "store": self.store,
            "key-file": self.folder / "keys",
            "max-workers": max(6, int(0.6 * len(self.tenants))),
            "idle-timeout": 3,
            "request-timeout": 8,
            "hook-timeout": 5,
            "ping-timeout": 2,
            "egress-allow": "127.0.0.0/8,::1/128",
            "log-level": "info",
        }
        given = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
        host = HostProcess(
            ["serve", str(self.folder / "plugins"), "--port", "0", "--log-format", "json", *given],
            env={"TMPDIR": str(self.temporary)},
        )
        try:
            yield host.wait_ready()
        finally:
            host.kill()

    async def _storm(self, host: HostProcess, clients: Clients) -> None:
        plan = self.plan
        await self._each(clients.put, "is installed")
        await self._each(self._serves(clients), "is served")
        if self.violations.count:
            return  # nothing that follows would tell more
        await self._calibrate(clients)
        self.agent.save_all()  # from now on every plugin has a version before the one that serves
        await self._each(self._serves(clients), "has the new version")
        await clients.leave()
        before, kept = await self._quiet(host), kinds(host.pid)
        faults = schedule(plan.seed, plan.seconds, plan.rate)
        self.say(f"{len(faults)} faults in {plan.seconds:.0f} s; calm is over after {self.allowed:.1f} s")
        clients.start(plan.clients)
        watching = asyncio.create_task(self._watch(host, clients))
        await self.agent.run(faults)
        await clients.stop()
        watching.cancel()
        began = time.monotonic()
        await self._each(self._serves(clients), "is well again", self.allowed)
        self.recovery = time.monotonic() - began
        await self._each(clients.read_back, "reads its settings")
        if host.process.poll() is not None:
            self.violations.add(f"the host ended with {host.process.returncode}")
            return
        await clients.leave()
        after = await self._quiet(host)
        self._compare(before, after, Counter(kinds(host.pid)) - Counter(kept))
        self._plateau()
        await self._end(host)
        self._look_at_log(host)

    def _serves(self, clients: Clients) -> Callable[[Tenant], Awaitable[bool]]:
        """Whether a tenant's worker has its last settings and the last version."""

        async def serves(tenant: Tenant) -> bool:
            told = self.last[tenant] = await clients.plain(tenant)
            return bool(told) and tenant.may_be(told["value"]) and told["version"] == self.agent.versions[tenant.plugin]

        return serves

    def _told(self, tenant: Tenant) -> str:
        told = self.last.get(tenant) or {}
        served = f"value {told.get('value')}, version {told.get('version')}"
        return f"{served}; wanted {tenant.acknowledged}, {self.agent.versions[tenant.plugin]}"

    async def _each(self, done: Callable[[Tenant], Awaitable[bool]], what: str, limit: float = 60.0) -> None:
        """Wait until ``done`` of every tenant, some at a time."""
        places = asyncio.Semaphore(_TOGETHER)
        deadline = time.monotonic() + limit

        async def wait(tenant: Tenant) -> None:
            while True:
                async with places:
                    if await done(tenant):
                        return
                if time.monotonic() > deadline:
                    where = f"{tenant.plugin} of {tenant.org}"
                    self.violations.add(f"not within {limit:.1f} s: {where} {what}: {self._told(tenant)}")
                    return
                await asyncio.sleep(0.05)

        await asyncio.gather(*map(wait, self.tenants))

    async def _calibrate(self, clients: Clients) -> None:
        """Measure how long it takes this machine to serve everybody again when all processes are killed at once."""
        began = time.monotonic()
        for process in self.agent.look():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        await self._each(self._serves(clients), "is well after that")
        took = time.monotonic() - began
        self.allowed = max(_CALM, _TIMES * took)
        clients.limit = max(clients.limit, 10 * took)

    async def _quiet(self, host: HostProcess) -> Sample:
        """What the host takes when nobody asks it for anything: all workers but spares have gone, nothing changes."""
        last: list[Sample] = []

        def steady() -> bool:
            family = self.agent.look()
            last.append(sample(host.pid, len(family)))
            recent = {one[1:] for one in last[-10:]}
            return len(last) > 10 and len(recent) == 1 and self._spares(family) <= len(self.plugins)

        deadline = time.monotonic() + 60
        while not steady():
            if time.monotonic() > deadline:
                roles = [one.role for one in self.agent.look()]
                self.violations.add(f"it does not come to rest: {last[-1]}, {sorted(roles)}")
                break
            await asyncio.sleep(0.2)
        return last[-1]

    @staticmethod
    def _spares(family: list[Process]) -> int:
        return sum(process.role == "worker" for process in family)

    async def _watch(self, host: HostProcess, clients: Clients) -> None:
        began, seconds = time.monotonic(), 0
        while True:
            await asyncio.sleep(1)
            seconds += 1
            with contextlib.suppress(OSError):
                self.samples.append(sample(host.pid, len(self.agent.look())))
            if seconds % 10 == 0 and self.samples:
                now = self.samples[-1]
                self.say(
                    f"{time.monotonic() - began:6.0f} s  {sum(clients.statuses.values())} answers  "
                    f"{sum(self.agent.done.values())} faults  {self.violations.count} violations  "
                    f"front {now.memory >> 10} MiB, {now.descriptors} descriptors, {now.threads} threads  "
                    f"{now.processes} processes"
                )

    def _compare(self, before: Sample, after: Sample, more: Counter[str]) -> None:
        """Nothing but memory may have become more when all is quiet again, and what is made when it is first needed."""
        spares = self._spares(self.agent.look())
        made = spares * _OF_A_WORKER + (_CONNECTIONS if self.plan.backend == "postgresql" else 0)
        if after.descriptors > before.descriptors + made or after.processes > before.processes + spares:
            self.violations.add(f"left behind: {before} before, {after} after: {dict(more)}")
        if after.threads > before.threads + _MORE:
            self.violations.add(f"threads left behind: {before} before, {after} after")

    def _plateau(self) -> None:
        thirds = _thirds(self.samples)
        if len(thirds) < 3:
            return
        _, second, third = thirds
        for name, was, now, more in zip(
            Sample._fields, second, third, (_MORE_MEMORY, _MORE, _MORE, _MORE), strict=True
        ):
            if now > 1.25 * was + more:
                self.violations.add(f"{name} goes on growing: {was:.0f}, then {now:.0f}")

    async def _end(self, host: HostProcess) -> None:
        """Stop the host, and see that nothing of it is left."""
        self.agent.look()
        port = host.port
        code = await asyncio.to_thread(_stop, host)
        if code != 0:
            self.violations.add(f"the host ended with {code}")
        try:
            await asyncio.to_thread(wait_until, lambda: not living(self.agent.seen), "all processes are gone", 10.0)
        except AssertionError:
            self.violations.add(f"processes are left: {living(self.agent.seen)}")
        if left := sorted(path.name for path in self.temporary.iterdir()):
            self.violations.add(f"temporary folders are left: {left}")
        if groups := list(_groups(host.pid)):
            self.violations.add(f"cgroups are left: {groups}")
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            self.violations.add(f"somebody still listens on {port}")

    def _look_at_log(self, host: HostProcess) -> None:
        own = {tenant.org: tenant.canary for tenant in self.tenants}
        for line in Path(host.log_file.name).read_bytes().splitlines():
            text = line.decode(errors="replace")
            if SECRET in text:
                self.violations.add(f"a secret in the log: {text[:300]}")
            if not line.startswith(b"{"):
                if line.strip():
                    self.violations.add(f"not a record in the log: {text[:300]}")
                continue
            record = json.loads(line)
            canaries = {found.decode() for found in CANARY.findall(line)}
            if canaries - {own.get(record.get("org", ""), "")}:
                self.violations.add(f"a canary in somebody else's record: {text[:300]}")
            bug = record["event"] in ("an internal error", "an internal task failed") or "Traceback" in text
            if bug and "plugin" not in record:
                self.violations.add(f"a bug of the host's: {text[:1500]}")

    def _keep(self, host: HostProcess) -> Path | None:
        """The log, if there is something to be found out from it."""
        if not self.violations.count:
            return None
        with tempfile.NamedTemporaryFile("w", prefix=f"storm-{self.plan.seed}-", suffix=".log", delete=False) as kept:
            kept.write(host.log)
        return Path(kept.name)


def _stop(host: HostProcess) -> int:
    host.process.terminate()
    return host.process.wait(60)


def _groups(pid: int) -> Iterable[Path]:
    return (path for path in Path("/sys/fs/cgroup").rglob(f"hayhost-{pid}-*") if path.is_dir())


def _thirds(samples: list[Sample]) -> list[tuple[float, ...]]:
    """The medians of what was sampled in the first, second and last third."""
    size = len(samples) // 3
    if size == 0:
        return []
    parts = [samples[:size], samples[size : 2 * size], samples[-size:]]
    return [tuple(statistics.median(column) for column in zip(*part, strict=True)) for part in parts]


@contextlib.asynccontextmanager
async def _echoing() -> AsyncIterator[int]:
    """A server on this machine that says back each line; its port."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                writer.write(line)
                await writer.drain()
        writer.close()

    listening = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


def storm(plan: Plan, say: Callable[[str], None] = lambda line: None) -> Report:
    """Run one; the report's violations are empty if all held."""
    with tempfile.TemporaryDirectory(prefix="hayhost-storm-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        return asyncio.run(_Storm(plan, folder, say).run())
