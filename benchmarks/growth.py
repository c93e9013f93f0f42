"""What grows with orgs and plugins, and what one of them costs the others.

python -m benchmarks.growth --json benchmarks/results/growth.json --plot docs/growth.svg

``orgs`` and ``plugins``: latency and throughput over all live orgs, and the front's processor time per request, which
depends least on what else the machine does. ``turns``: many more orgs than workers, one after the other.
``fairness``: an org's requests while another org's clients never pause, and while another plugin imports.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from hayhost.bench.client import Connection, encode_request, load
from hayhost.bench.figures import machine, percentile, summary
from hayhost.bench.host import Host, running

PARTS: Final = ("orgs", "plugins", "turns", "fairness")
PLUGIN: Final = """from hayhost.sdk import *
{top}

@define_hay_plugin
class P:
    name = "p"

    def on_initialize(self, ctx):
        ctx.register.route("POST", "/echo", self.echo)

    async def echo(self, req):
        return {{"body": req.json()}}
"""
MANIFEST: Final = """[project]
name = "{name}"
version = "1"
[tool.hay-plugin]
entry = "./plugin.py"
displayName = "p"
category = "tool"
capabilities = ["routes"]
"""
KEEP: Final = ("--spares", "0", "--idle-timeout", "3600")
SLOW_IMPORT: Final = 3.0


def write(folder: Path, name: str, top: str = "") -> None:
    """A plugin with one route, and ``top`` at the top of its module."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "pyproject.toml").write_text(MANIFEST.format(name=name))
    (folder / name / "plugin.py").write_text(PLUGIN.format(top=top))


@contextlib.contextmanager
def hosting(plugins: int, *options: str) -> Iterator[tuple[Host, Path, float]]:
    """A host with that many plugins, ``p0`` and so on: with its folder, and the seconds until it was ready."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        folder.chmod(0o755)
        for number in range(plugins):
            write(folder, f"p{number}")
        begun = time.monotonic()
        with running(folder, *options) as host:
            yield host, folder, time.monotonic() - begun


def request(plugin: str, org: object) -> bytes:
    """A small POST."""
    return encode_request("POST", f"/plugins/{plugin}/org{org}/echo", b'{"id":1}')


def cpu(pid: int) -> float:
    """Seconds of processor time of a process's main thread."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def cost(host: Host, requests: list[bytes], rounds: int, seconds: float) -> dict[str, Any]:
    """Latency one by one and throughput of 32 clients, over all ``requests``."""
    chance = random.Random(0)
    requests = chance.sample(requests, len(requests))
    client = Connection(host.port)
    for one in chance.choices(requests, k=200):
        client.ask(one)
    latencies = [client.ask(one) / 1e6 for one in chance.choices(requests, k=2_000)]
    client.close()
    rates, costs = [], []
    for _ in range(rounds):
        before = cpu(host.process.pid)
        done = load(host.port, requests, 32, seconds)
        costs.append((cpu(host.process.pid) - before) / len(done.times) * 1e6)
        rates.append(done.rate)
        if set(done.statuses) != {200}:
            raise RuntimeError(f"answers were {done.statuses}")
    return {"latency ms": summary(latencies), "requests/s": summary(rates), "front us/request": summary(costs)}


def orgs(options: argparse.Namespace) -> dict[str, Any]:
    """At a growing number of live orgs of one plugin."""
    result = {}
    with hosting(1, "--no-reload", *KEEP, "--max-workers", str(max(options.orgs) + 10)) as (host, _, _):
        client, alive = Connection(host.port), 0
        for count in options.orgs:
            starts = []
            for org in range(alive, count):
                starts.append(client.ask(request("p0", org)) / 1e6)
            alive = count
            figures = cost(host, [request("p0", org) for org in range(count)], options.rounds, options.seconds)
            result[str(count)] = {**figures, "start ms": summary(starts), "front RSS MiB": host.rss()}
    return result


def plugins(options: argparse.Namespace) -> dict[str, Any]:
    """With one org of each of a number of plugins."""
    result = {}
    for count in options.plugins:
        with hosting(count, *KEEP) as (host, _, ready):
            client = Connection(host.port)
            starts = [client.ask(request(f"p{number}", 0)) / 1e6 for number in range(count)]
            requests = [request(f"p{number}", 0) for number in range(count)]
            figures = cost(host, requests, options.rounds, options.seconds)
            result[str(count)] = {"ready s": round(ready, 2), **figures, "start ms": summary(starts)}
    return result


def turns(options: argparse.Namespace) -> dict[str, Any]:
    """Many orgs in turn through few workers, in four quarters."""
    quarters = []
    with hosting(1, "--no-reload", *KEEP, "--max-workers", str(options.workers)) as (host, _, _):
        client = Connection(host.port)
        for quarter in range(4):
            times = []
            for org in range(quarter * options.turns // 4, (quarter + 1) * options.turns // 4):
                times.append(client.ask(request("p0", org)) / 1e6)
                if client.status != 200:
                    raise RuntimeError(f"org {org} was answered {client.status}: {client.body!r}")
            quarters.append({
                "first request ms": summary(times),
                "p99 ms": round(percentile(times, 0.99), 2),
                "processes": len(host.processes()),
                "descriptors": host.descriptors(),
                "front RSS MiB": host.rss(),
            })  # fmt: skip
    return {"orgs": options.turns, "max_workers": options.workers, "quarters": quarters}


@contextlib.contextmanager
def busy(host: Host, path: str, connections: int) -> Iterator[None]:
    """Clients in a process of their own that never pause, for the block and at most a minute."""
    command = [sys.executable, "-m", "hayhost.bench.client", str(host.port), path, str(connections), "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout
        process.stdout.readline()
        yield
    finally:
        process.kill()
        process.communicate()


def paced(host: Host, org: str, seconds: float) -> list[float]:
    """Milliseconds of requests that come every 5 ms, whatever the others do."""
    client, one, times = Connection(host.port), request("p0", org), []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        times.append(client.ask(one) / 1e6)
        time.sleep(0.005)
    client.close()
    return times


def fairness(options: argparse.Namespace) -> dict[str, Any]:
    """An org in quiet, and beside another org at full load, and beside a plugin that takes long to import."""
    seen: dict[str, list[list[float]]] = {"quiet": [], "another org at full load": [], "another plugin imports": []}
    with hosting(2, *KEEP) as (host, folder, _):
        client = Connection(host.port)
        for one in (request("p0", "a"), request("p0", "b"), request("p1", "a")):
            client.ask(one)
        for number in range(options.rounds):
            seen["quiet"].append(paced(host, "a", options.seconds))
            with busy(host, "/plugins/p0/orgb/echo", options.clients):
                seen["another org at full load"].append(paced(host, "a", options.seconds))
            reloads = len(host.events("reloaded"))
            write(folder, "p1", f"import time\ntime.sleep({SLOW_IMPORT})  # {number}")
            seen["another plugin imports"].append(paced(host, "a", SLOW_IMPORT))
            while len(host.events("reloaded")) == reloads:
                time.sleep(0.02)
    quiet = [percentile(times, 0.99) for times in seen["quiet"]]
    result = {}
    for name, rounds in seen.items():
        tails = [percentile(times, 0.99) for times in rounds]
        ratios = [tail / base for tail, base in zip(tails, quiet, strict=True)]
        result[name] = {
            "p50 ms": summary([percentile(times, 0.5) for times in rounds])["p50"],
            "p99 ms": summary(tails)["p50"],
            "p99 of quiet": summary(ratios)["p50"],
        }
    return result


def plot(result: dict[str, Any], file: Path) -> None:
    """Cost per request over orgs and plugins, and the first requests over the turns."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3))
    for place, part in zip(axes, ("orgs", "plugins"), strict=False):
        counts = [int(count) for count in result.get(part, {})]
        for what, colour in (("front us/request", "#4477aa"), ("latency ms", "#ee6677")):
            scale = 1000 if what == "latency ms" else 1
            values = [figures[what]["p50"] * scale for figures in result.get(part, {}).values()]
            label = "latency, one by one" if scale > 1 else "front's processor time"
            place.plot(counts, values, "o-", color=colour, label=label)
        place.set(xscale="log", xlabel=part, ylabel="µs per request", ylim=(0, None), title=f"Live {part}")
        place.legend(fontsize=7, frameon=False)
    quarters = result.get("turns", {}).get("quarters", [])
    axes[2].bar(range(1, len(quarters) + 1), [one["first request ms"]["p50"] for one in quarters], color="#4477aa")
    axes[2].set(xlabel="quarter of the orgs", ylabel="ms", title="First requests, workers evicted")
    for place in axes:
        place.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=PARTS, action="append", help="this part only; may be repeated")
    parser.add_argument("--orgs", type=int, nargs="*", default=[10, 100, 1000, 2000])
    parser.add_argument("--plugins", type=int, nargs="*", default=[20, 200])
    parser.add_argument("--turns", type=int, default=5000, help="orgs in turn (5000)")
    parser.add_argument("--workers", type=int, default=500, help="max_workers of the turns (500)")
    parser.add_argument("--clients", type=int, default=16, help="clients of the org at full load (16)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--plot", type=Path, help="draw the result into this file (.svg or .png); needs matplotlib")
    options = parser.parse_args()
    result: dict[str, Any] = {}
    for part in options.only or PARTS:
        result[part] = globals()[part](options)
        print(json.dumps({part: result[part]}, indent=1), flush=True)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
