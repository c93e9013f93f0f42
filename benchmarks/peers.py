"""hayhost beside what one could use instead: all up at once, asked in turn, so that what disturbs one disturbs all.

python -m benchmarks.peers --json benchmarks/results/peers.json --plot docs/peers.svg

Every peer answers `POST .../echo` with the JSON that it got, for a few orgs, and starts an org's worker when it is
asked for one. What each one is stands in `PEERS`. hayhost is isolated at the level that the machine gives; no peer is.
"""

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from hayhost.bench.client import Connection, encode_request, load
from hayhost.bench.figures import machine, percentile
from hayhost.bench.host import running
from hayhost.bench.measure import memory_of

HERE: Final = Path(__file__).parent
BODY: Final = b'{"id":1,"text":"hello"}'
CONNECTIONS: Final = (1, 8, 32)
PACKAGES: Final = ("uvicorn", "starlette", "httpx", "multiprocess")

Server = Callable[[], "contextlib.AbstractContextManager[tuple[int, int]]"]
"""Runs one: its port and its pid."""

PEERS: Final = {
    "Tornado HTTPServer": "the limit: the delegates that hayhost's front is built on, answering in-process",
    "tornado.web": "the limit with Tornado's usual handlers",
    "hayhost": "a confined process per org behind the front",
    "uvicorn + Tornado proxy": "a uvicorn and Starlette process per org, behind a Tornado proxy with AsyncHTTPClient",
    "uvicorn + httpx proxy": "the same behind a Starlette proxy with httpx",
    "multiprocess + pipe": "a multiprocess process per org (spawned) with a pipe, behind Tornado; no zygote",
    "Express + fetch proxy": "an Express worker per org behind an Express proxy with fetch",
}


@contextlib.contextmanager
def served(command: list[str], folder: Path | None = None) -> Iterator[tuple[int, int]]:
    """A server that prints its port as its first line."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder)
    try:
        assert process.stdout
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise RuntimeError(f"{' '.join(command)} did not start: {line!r}")
        yield int(line), process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def hayhost(plugins: Path) -> Iterator[tuple[int, int]]:
    """The host, without spares: each of its first requests forks."""
    shutil.copytree(HERE.parent / "plugins" / "echo", plugins / "echo")
    with running(plugins, "--no-reload", "--spares", "0") as host:
        yield host.port, host.process.pid


def express(folder: Path) -> Path | None:
    """A folder with Express in it, installed from npm; ``None`` where that cannot be had."""
    if not shutil.which("node") or not shutil.which("npm"):
        return None
    for name in ("express_proxy.js", "express_worker.js"):
        shutil.copy(HERE / "peer_servers" / name, folder)
    (folder / "package.json").write_text('{"name": "peers", "private": true}')
    command = ["npm", "install", "--no-audit", "--no-fund", "--silent", "express@4"]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, timeout=180)
    return folder if done.returncode == 0 else None


def servers(folder: Path) -> tuple[dict[str, Server], list[str]]:
    """What can be run here, and why the rest cannot."""

    def python(module: str, *arguments: str) -> Server:
        command = [sys.executable, "-m", f"benchmarks.peer_servers.{module}", *arguments]
        return lambda: served(command, HERE.parent)

    plugins = folder / "plugins"
    plugins.mkdir()
    found: dict[str, Server] = {
        "Tornado HTTPServer": python("tornado_alone", "delegates"),
        "tornado.web": python("tornado_alone", "web"),
        "hayhost": lambda: hayhost(plugins),
        "multiprocess + pipe": python("pipes"),
    }
    missing = []
    try:
        version("uvicorn"), version("starlette"), version("httpx")
        found["uvicorn + Tornado proxy"] = python("tornado_proxy")
        found["uvicorn + httpx proxy"] = python("httpx_proxy")
    except PackageNotFoundError as error:
        missing.append(f"uvicorn: no {error.name}; pip install uvicorn starlette httpx")
    node = folder / "node"
    node.mkdir()
    if express(node):
        found["Express + fetch proxy"] = lambda: served(["node", "express_proxy.js"], node)
    else:
        missing.append("Express: no node and npm, or npm has no registry")
    return {name: found[name] for name in PEERS if name in found}, missing


def request(org: str) -> bytes:
    """The same for all."""
    return encode_request("POST", f"/plugins/echo/{org}/echo", BODY)


def below(pid: int) -> list[int]:
    """The pids of all processes below ``pid``, and itself."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [pid]
    for one in found:
        found += children.get(one, [])
    return found


def pss(pid: int) -> float:
    """Megabytes of a server and all below it."""
    total = 0.0
    for one in below(pid):
        with contextlib.suppress(OSError, KeyError):
            total += memory_of(one)["PSS"]
    return total


def cold_start(port: int, org: str) -> float:
    """Milliseconds of the first request to an org, over a connection that is there."""
    client = Connection(port)
    client.ask(request("org0"))
    took = client.ask(request(org)) / 1e6
    if client.status != 200:
        raise RuntimeError(f"the first request was answered {client.status}: {client.body!r}")
    client.close()
    return took


def measure(options: argparse.Namespace, up: dict[str, tuple[int, int]]) -> dict[str, Any]:
    """All figures of all servers, in turn."""
    cold: dict[str, list[float]] = {name: [] for name in up}
    memory: dict[str, float] = {}
    before = {}
    for name, (port, pid) in up.items():
        cold_start(port, "org0")
        before[name] = pss(pid)
    for number in range(1, options.starts + 1):
        for name, (port, _) in up.items():
            cold[name].append(cold_start(port, f"org{number}"))
    for name, (_, pid) in up.items():
        memory[name] = (pss(pid) - before[name]) / options.starts
    rates: dict[tuple[str, int], list[float]] = {}
    p50: dict[tuple[str, int], list[float]] = {}
    for connections in CONNECTIONS:
        for number in range(options.rounds):
            names = list(up) if number % 2 else list(up)[::-1]
            for name in names:
                done = load(up[name][0], [request("org0")], connections, options.seconds)
                if set(done.statuses) != {200}:
                    raise RuntimeError(f"{name}: {done.statuses}")
                rates.setdefault((name, connections), []).append(done.rate)
                p50.setdefault((name, connections), []).append(done.milliseconds(0.5))
    limit = {count: rates["Tornado HTTPServer", count] for count in CONNECTIONS}
    in_process = ("Tornado HTTPServer", "tornado.web")
    return {
        name: {
            "cold start ms": None if name in in_process else _spread(cold[name]),
            "PSS of a further worker MB": None if name in in_process else round(memory[name], 2),
            "latency p50 ms": {str(count): _spread(p50[name, count]) for count in CONNECTIONS},
            "requests/s": {str(count): _spread(rates[name, count]) for count in CONNECTIONS},
            "of Tornado HTTPServer": {
                str(count): _spread([a / b for a, b in zip(rates[name, count], limit[count], strict=True)])
                for count in CONNECTIONS
            },
        }
        for name in up
    }


def _spread(values: list[float]) -> dict[str, float]:
    def short(value: float) -> float:
        return float(f"{value:.4g}")

    return {
        "p50": short(statistics.median(values)),
        "p10": short(percentile(values, 0.1)),
        "p90": short(percentile(values, 0.9)),
    }


def plot(result: dict[str, Any], file: Path) -> None:
    """Throughput, cold start and memory, side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    names = list(result)[::-1]

    def bars(place: Any, title: str, values: list[float | None], log: bool = False) -> None:
        colours = ["#228833" if name == "hayhost" else "#4477aa" for name in names]
        drawn = place.barh(names, [value or 0 for value in values], color=colours)
        labels = ["" if value is None else f"{value:,.4g}" for value in values]
        place.bar_label(drawn, labels, padding=3, fontsize=8)
        place.set(title=title)
        if log:
            place.set_xscale("log")
        place.margins(x=0.25)
        place.spines[["top", "right"]].set_visible(False)

    bars(axes[0], "requests/s, 32 connections", [result[name]["requests/s"]["32"]["p50"] for name in names])
    starts = [result[name]["cold start ms"] for name in names]
    bars(axes[1], "first request to an org, ms", [start and start["p50"] for start in starts], log=True)
    bars(axes[2], "a further idle worker, MB (PSS)", [result[name]["PSS of a further worker MB"] for name in names])
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="rounds of load per number of connections (7)")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of each (1)")
    parser.add_argument("--starts", type=int, default=10, help="workers to start and measure (10)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--plot", type=Path, help="draw the result into this file (.svg or .png); needs matplotlib")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        Path(directory).chmod(0o755)
        runnable, missing = servers(Path(directory))
        up = {name: stack.enter_context(server()) for name, server in runnable.items()}
        result = measure(options, up)
    for name, figures in result.items():
        start, each = figures["cold start ms"], figures["PSS of a further worker MB"]
        print(
            f"{name:<26} {figures['latency p50 ms']['1']['p50']:7.3f} ms at 1 connection"
            f"  {figures['requests/s']['32']['p50']:8,.0f}/s at 32"
            f" ({figures['of Tornado HTTPServer']['32']['p50']:.2f})"
            + (f"  start {start['p50']:7.1f} ms  {each:6.1f} MB" if start else "")
        )
    for line in missing:
        print(f"left out: {line}")
    if options.json:
        versions = {}
        for package in PACKAGES:
            with contextlib.suppress(PackageNotFoundError):
                versions[package] = version(package)
        if shutil.which("node"):
            node = subprocess.run(["node", "--version"], capture_output=True, text=True, check=False)
            versions["node"] = node.stdout.strip()
        whole = {"machine": {**machine(), **versions}, "about": PEERS, "left out": missing, "peers": result}
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
