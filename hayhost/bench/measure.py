"""What ``hayhost bench`` measures, each part with hosts of its own."""

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import msgspec

from hayhost.errors import HostError

from .client import Connection, Load, encode_request, load
from .figures import YARDSTICK, Figure
from .host import Host, running
from .reference import reference

__all__ = [
    "CONNECTIONS",
    "ORG_COUNTS",
    "Subject",
    "cold_starts",
    "memory",
    "memory_of",
    "reloads",
    "routes",
    "start_orgs",
]

Step = Callable[[], None]

CONNECTIONS: Final = (1, 8, 32)
ORG_COUNTS: Final = (1, 10, 100, 1_000)
_WARM_UP: Final = 3
# Spares are refilled by then: 50 ms after the last start.
_REFILL: Final = 0.1
_SPARES: Final = 4
_DEBOUNCE: Final = 0.1
# From /proc/PID/smaps_rollup, in kB.
_KINDS: Final = {"PSS": ("Pss",), "private dirty": ("Private_Dirty",), "RSS": ("Rss",)}
_PER_WORKER: Final = 6 << 20  # bytes; more than a worker takes, to leave the machine alive


class Subject(msgspec.Struct, frozen=True):
    """A copy of a plugin in a folder of its own, the request that it is asked, and the host's options."""

    plugins: Path
    name: str
    entry: Path
    method: str
    path: str
    body: bytes
    options: tuple[str, ...]

    def request(self, org: str) -> bytes:
        """The request for an org, as it is sent."""
        return encode_request(self.method, f"/plugins/{self.name}/{org}{self.path}", self.body)

    def serve(self, *options: str) -> "contextlib.AbstractContextManager[Host]":
        """A host that serves it."""
        return running(self.plugins, *self.options, *options)


def cold_starts(subject: Subject, rounds: int, step: Step) -> list[Figure]:
    """First requests to orgs without a worker, with and without a spare in turn; ``rounds`` of each, one ``step``."""
    common = ("--no-reload", "--log-level", "debug", "--idle-timeout", "3600", "--max-workers", str(4 * rounds + 100))
    begun: dict[bool, list[int]] = {False: [], True: []}
    ended: dict[bool, list[int]] = {False: [], True: []}
    with subject.serve(*common, "--spares", "0") as plain, subject.serve(*common, "--spares", str(_SPARES)) as spared:
        hosts = {False: plain, True: spared}
        clients = {spare: Connection(host.port) for spare, host in hosts.items()}
        for number in range(rounds + _WARM_UP):
            for spare, client in clients.items():
                took = client.ask(subject.request(f"org{number}"))
                if client.status >= 500:
                    raise HostError(f"the first request to an org was answered {client.status}: {_text(client.body)}")
                begun[spare].append(client.sent)
                ended[spare].append(client.sent + took)
            time.sleep(_REFILL)
            if number >= _WARM_UP:
                step()
        stamps = {spare: _stamps(host) for spare, host in hosts.items()}
    figures = []
    for spare, host_stamps in stamps.items():
        group = "cold start with a spare" if spare else "cold start"
        phases: dict[str, list[float]] = {"first answer": []}
        for number in range(_WARM_UP, rounds + _WARM_UP):
            start, end = begun[spare][number], ended[spare][number]
            at = host_stamps[f"org{number}"]
            if spare and at["asked"] > start:
                continue  # there was none: its start had been slow
            phases["first answer"].append((end - start) / 1e6)
            for phase, took in _phases(start, end, at, spare).items():
                phases.setdefault(phase, []).append(took / 1e6)
        if phases["first answer"]:
            figures += [Figure(group, name, "ms", "lower", values) for name, values in phases.items()]
    return figures


def _stamps(host: Host) -> dict[str, dict[str, int]]:
    return {event["org"]: dict(event["stamps"]) for event in host.events("worker ready")}


def _phases(start: int, end: int, at: dict[str, int], spare: bool) -> dict[str, int]:
    """Nanoseconds from phase to phase; all processes of a machine share the clock."""
    if spare:
        return {
            "route": at["identity"] - start,
            "hooks": at["on_start"] - at["identity"],
            "answer": end - at["on_start"],
        }
    return {
        "route": at["asked"] - start,
        "fork": at["forked"] - at["asked"],
        "confine": at["confined"] - at["forked"],
        "admit": at["identity"] - at["confined"],
        "hooks": at["on_start"] - at["identity"],
        "answer": end - at["on_start"],
    }


def routes(subject: Subject, rounds: int, seconds: float, step: Step) -> list[Figure]:
    """Latency and throughput of the route, in turn with a server that answers the same in-process.

    ``step`` is called once for each round of each number of connections.
    """
    measured: dict[tuple[int, str], list[Load]] = {}
    with subject.serve("--no-reload", "--spares", "0") as host:
        client = Connection(host.port)
        request = subject.request("org0")
        client.ask(request)
        status = client.status
        if status >= 500:
            raise HostError(f"{subject.method} {subject.path} was answered {status}: {_text(client.body)}")
        with reference(client.body) as yardstick:
            for port in (host.port, yardstick):
                load(port, [request], 4, min(0.3, seconds))
            for connections in CONNECTIONS:
                for number in range(rounds):
                    order = [("host", host.port), ("tornado", yardstick)]
                    for who, port in order if number % 2 else order[::-1]:
                        measured.setdefault((connections, who), []).append(load(port, [request], connections, seconds))
                    step()
    for (_, who), loads in measured.items():
        if who == "host" and any(set(one.statuses) != {status} for one in loads):
            raise HostError(f"under load the answers were {sum((one.statuses for one in loads), loads[0].statuses)}")
    return [figure for connections in CONNECTIONS for figure in _route_figures(connections, measured)]


def _route_figures(connections: int, measured: dict[tuple[int, str], list[Load]]) -> list[Figure]:
    ours, theirs = measured[connections, "host"], measured[connections, "tornado"]
    group = f"route, {connections} connection{'s' if connections > 1 else ''}"
    pairs = list(zip(ours, theirs, strict=True))
    figures = [
        Figure(group, "latency p50", "ms", "lower", [one.milliseconds(0.5) for one in ours]),
        Figure(group, "latency p99", "ms", "lower", [one.milliseconds(0.99) for one in ours]),
    ]
    if connections == 1:
        added = [a.milliseconds(0.5) - b.milliseconds(0.5) for a, b in pairs]
        figures.append(Figure(group, "added to Tornado", "ms", "lower", added))
        alone = [one.milliseconds(0.5) for one in theirs]
        return [*figures, Figure(group, f"latency p50 {YARDSTICK}", "ms", "lower", alone)]
    return [
        *figures,
        Figure(group, "throughput", "/s", "higher", [one.rate for one in ours]),
        Figure(group, f"throughput {YARDSTICK}", "/s", "higher", [one.rate for one in theirs]),
        Figure(group, "share of Tornado's", "", "higher", [a.rate / b.rate for a, b in pairs]),
    ]


def start_orgs(host: Host, subject: Subject, orgs: range, step: Step) -> None:
    """Ask for each of ``orgs`` once, one after the other."""
    client = Connection(host.port)
    for org in orgs:
        client.ask(subject.request(f"org{org}"))
        if client.status >= 500:
            raise HostError(f"org {org} was answered {client.status}: {_text(client.body)}")
        step()
    client.close()


def memory(subject: Subject, most: int, step: Step) -> tuple[list[Figure], list[str]]:
    """Memory of each idle worker at 1, 10, 100, ... orgs up to ``most``, and notes; one ``step`` for each org.

    Every worker has answered one request.
    """
    figures: list[Figure] = []
    notes: list[str] = []
    options = ("--no-reload", "--spares", "0", "--idle-timeout", "3600", "--max-workers", str(most + 10))
    with subject.serve(*options, "--log-level", "debug") as host:
        alive = 0
        for orgs in (count for count in ORG_COUNTS if count <= most):
            if (free := _available()) < (orgs - alive) * _PER_WORKER:
                notes.append(f"memory at {orgs} orgs is left out: there are only {free >> 20} MiB free")
                break
            start_orgs(host, subject, range(alive, orgs), step)
            alive = orgs
            try:
                each = [memory_of(event["worker"]) for event in host.events("worker ready")]
            except PermissionError:
                notes.append("memory is left out: only root may see what confined processes use")
                break
            for kind in _KINDS:
                values = [one[kind] for one in each]
                figures.append(Figure(f"memory at {orgs} org{'s' if orgs > 1 else ''}", kind, "MB", "lower", values))
    return figures, notes


def memory_of(pid: int) -> dict[str, float]:
    """Megabytes of a process, by kind. Raises ``PermissionError``."""
    sizes = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        key, _, rest = line.partition(":")
        sizes[key] = int(rest.split()[0]) * 1024 / 1e6
    return {kind: sum(sizes[key] for key in keys) for kind, keys in _KINDS.items()}


def _available() -> int:
    found = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable"))
    return int(found.split()[1]) << 10


def reloads(subject: Subject, rounds: int, step: Step) -> list[Figure]:
    """Milliseconds from a save, less the debounce, until a worker of the new version has the org."""
    taken: list[float] = []
    loads: list[float] = []
    with subject.serve("--spares", "0", "--debounce", str(_DEBOUNCE)) as host:
        client = Connection(host.port)
        client.ask(subject.request("org0"))
        for number in range(rounds + 1):
            before = _pid(host, subject)
            begun = time.monotonic()
            _save(subject.entry, f"# {number}\n")
            while _pid(host, subject) == before:
                if time.monotonic() - begun > 60:
                    raise HostError("the plugin was saved, and its new code never answered")
                time.sleep(0.001)
            took = (time.monotonic() - begun - _DEBOUNCE) * 1000
            while len(done := host.events("reloaded")) <= number:
                time.sleep(0.005)
            if number:  # the first one warms up
                taken.append(took)
                loads.append(float(done[-1]["load_ms"]))
                step()
    return [
        Figure("reload", "save to new code", "ms", "lower", taken),
        Figure("reload", "of which load", "ms", "lower", loads),
    ]


def _pid(host: Host, subject: Subject) -> Any:
    return host.json(f"/plugins/{subject.name}/org0/health")["pid"]


def _save(file: Path, comment: str) -> None:
    """Add a comment as editors save: a new file in the old one's place."""
    new = file.with_name(f".{file.name}.tmp")
    new.write_bytes(file.read_bytes() + b"\n" + comment.encode())
    new.chmod(0o644)
    os.replace(new, file)


def _text(body: bytes) -> str:
    return body[:300].decode(errors="replace")
