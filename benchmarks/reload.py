"""How long a saved file takes to answer, what reloading costs requests, and what a burst of writes does.

python -m benchmarks.reload --json benchmarks/results/reload.json --plot docs/reload.svg
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from hayhost.bench.figures import machine, summary
from hayhost.bench.host import Host, running

from .load import Load

DEBOUNCE = 100.0
TARGET = 150.0

MANIFEST = """[project]
name = "p"
version = "1"
[tool.hay-plugin]
entry = "./plugin.py"
displayName = "p"
category = "tool"
capabilities = ["routes"]
"""
PLUGIN = """from hayhost.sdk import *

VERSION = {version}

@define_hay_plugin
class P:
    name = "p"

    def on_initialize(self, ctx):
        ctx.register.route("GET", "/version", self.version)

    async def version(self, req):
        return str(VERSION)
"""


def save(folder: Path, version: int) -> None:
    """Save the plugin as editors do: a new file in the old one's place."""
    temporary = folder / ".plugin.py.tmp"
    temporary.write_text(PLUGIN.format(version=version))
    os.replace(temporary, folder / "plugin.py")


def latency(host: Host, folder: Path, rounds: int) -> dict[str, Any]:
    """Milliseconds from the save to the first answer of the new code, and the phases that the host reports."""
    after, load, swap = [], [], []
    for version in range(1, rounds + 1):
        begun = time.perf_counter()
        save(folder, version)
        while host.get("/plugins/p/acme/version")[1] != str(version).encode():
            if time.perf_counter() - begun > 30:
                raise RuntimeError("the new code never answered")
            time.sleep(0.001)
        after.append((time.perf_counter() - begun) * 1000 - DEBOUNCE)
        while len(done := host.events("reloaded")) < version:
            time.sleep(0.005)
        load.append(float(done[-1]["load_ms"]))
        swap.append(float(done[-1]["ms"] - done[-1]["load_ms"]))
    notice = [value - load[at] for at, value in enumerate(after)]
    return {
        "ms after the debounce": summary(after),
        "phases": {
            "event, digest, answer": summary(notice),
            "load, first worker": summary(load),
            "other workers": summary(swap),
        },
        "values": [round(value, 2) for value in after],
    }


def _state(host: Host) -> dict[str, float]:
    return {"processes": len(host.processes()), "descriptors": host.descriptors(), "rss MiB": host.rss()}


def under_load(host: Host, folder: Path, reloads: int, connections: int, orgs: int) -> dict[str, Any]:
    """Reload ``reloads`` times while clients go on."""
    for org in range(orgs):
        host.get(f"/plugins/p/org{org}/version")
    first = int(host.get("/plugins/p/org0/version")[1])
    done = len(host.events("reloaded"))
    with Load(host.port, connections, orgs) as load:
        for number in range(1, reloads + 1):
            save(folder, first + number)
            while len(host.events("reloaded")) < done + number:
                time.sleep(0.01)
            if number == 3:  # buffers, pools and the version before are there by now
                before = _state(host)
    deadline = time.monotonic() + 20
    while len(host.processes()) > before["processes"] and time.monotonic() < deadline:
        time.sleep(0.1)  # old workers finish
    return {
        "reloads": reloads,
        "connections": connections,
        "orgs": orgs,
        **load.report,
        "after 3 reloads": before,
        "at the end": _state(host),
    }


def _write(folder: Path, writes: int) -> None:
    for number in range(writes):
        (folder / f"{number % 5000}.txt").write_text(str(number))


def burst(host: Host, folder: Path, writes: int) -> dict[str, Any]:
    """Write many files at once in the plugin's folder, with one client on: reloads, and the client's latency.

    Beside it, the latency without writes and, because the writing itself takes a processor, with the same writes in a
    folder that nobody watches.
    """
    inside = folder / "data"
    inside.mkdir()
    with tempfile.TemporaryDirectory() as directory:
        outside = Path(directory)
        with Load(host.port, 1, 1) as quiet:
            time.sleep(5)
        with Load(host.port, 1, 1) as elsewhere:
            _write(outside, writes)
    reloads = len(host.events("reloaded"))
    with Load(host.port, 1, 1) as here:
        _write(inside, writes)
        while len(host.events("reloaded")) == reloads:
            time.sleep(0.05)
        time.sleep(2)
    runs = {"quiet": quiet, "writes elsewhere": elsewhere, "writes in the plugin": here}
    return {
        "writes": writes,
        "reloads": len(host.events("reloaded")) - reloads,
        "failed": here.report["failed"],
        "p99 ms": {name: run.report["p99 ms"] for name, run in runs.items()},
    }


def plot(result: dict[str, Any], file: Path) -> None:
    """Draw the time of each reload and the medians of its phases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 2))
    taken = result["latency"]
    left.plot(taken["values"], ".", color="tab:blue")
    left.axhline(TARGET, color="tab:red", linewidth=1, label=f"target for the median: {TARGET:g} ms")
    left.axhline(taken["ms after the debounce"]["p50"], color="tab:blue", linewidth=1, label="median")
    left.set(xlabel="reload", ylabel="ms after the debounce", ylim=(0, None), title="Save to new code answering")
    left.legend(loc="lower right")
    bottom = 0.0
    for name, phase in taken["phases"].items():
        right.bar(0, phase["p50"], bottom=bottom, label=f"{name}: {phase['p50']:g} ms")
        bottom += phase["p50"]
    right.set(xticks=[], ylabel="ms", title="Phases (medians)", xlim=(-0.6, 4.5), ylim=(0, bottom * 1.1))
    right.legend(loc="center right", frameon=False)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100, help="reloads to time (100)")
    parser.add_argument("--reloads", type=int, default=100, help="reloads under load (100)")
    parser.add_argument("--writes", type=int, default=60_000, help="file writes in the burst (60000)")
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--plot", type=Path, help="draw the result into this file (.svg or .png); needs matplotlib")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "p"
        folder.mkdir()
        (folder / "pyproject.toml").write_text(MANIFEST)
        save(folder, 0)
        with running(Path(directory)) as host:
            host.get("/plugins/p/acme/version")
            result = {"machine": machine(), "latency": latency(host, folder, options.rounds)}
            result["under load"] = under_load(host, folder, options.reloads, connections=32, orgs=20)
            result["burst"] = burst(host, folder, options.writes)
    shown = {**result, "latency": {key: value for key, value in result["latency"].items() if key != "values"}}
    print(json.dumps(shown, indent=2))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
