"""What a bomb in one org's worker costs another org's requests.

python -m benchmarks.bombs --json benchmarks/results/bombs.json --plot docs/bombs.svg

A client asks one org's worker without a pause, first in quiet and then while another org's worker of the same plugin
does its worst, several times in turn. What counts is the ratio of the medians of the same round.
"""

import argparse
import http.client
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from hayhost.bench.figures import machine, percentile
from hayhost.bench.host import running

from .reload import MANIFEST

PLUGIN: Final = """
from hayhost.sdk import *
import os, threading, time

HELD = []
END = 5.0

def until_the_end(step):
    end = time.monotonic() + END
    while time.monotonic() < end:
        try:
            step()
        except (MemoryError, OSError, RuntimeError):
            time.sleep(0.001)

def memory(req):
    until_the_end(lambda: HELD.append(os.urandom(1 << 20)))

def processes(req):
    def fork():
        pid = os.fork()
        while not pid:
            time.sleep(10)
    until_the_end(fork)

def threads(req):
    until_the_end(lambda: threading.Thread(target=time.sleep, args=(10,), daemon=True).start())

def descriptors(req):
    until_the_end(lambda: HELD.append(open("/dev/null")))

def disk(req):
    def write():
        with open(f"{os.environ['TMPDIR']}/{time.monotonic_ns()}", "wb") as file:
            file.write(bytes(1 << 20))
    until_the_end(write)

async def spin(req):
    end = time.monotonic() + END
    while time.monotonic() < end:
        pass

def log(req):
    until_the_end(lambda: print("x" * 200))

BOMBS = {function.__name__: function for function in (memory, processes, threads, descriptors, disk, spin, log)}

@define_hay_plugin
class P:
    name = "p"

    def on_initialize(self, ctx):
        ctx.register.route("GET", "/ping", self.ping)
        for name, function in BOMBS.items():
            ctx.register.route("POST", f"/{name}", function)

    async def ping(self, req):
        return {}
"""
BOMBS: Final = ("memory", "processes", "threads", "descriptors", "disk", "spin", "log")
PERMISSIONS: Final = """[tool.hay-plugin.permissions]
subprocess = ["true"]
"""


def latencies(port: int, seconds: float) -> list[float]:
    """Milliseconds of each of one client's requests to a quiet org."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    times = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        begun = time.perf_counter()
        connection.request("GET", "/plugins/p/quiet/ping")
        answer = connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise RuntimeError(f"the quiet org was answered {answer.status}")
        times.append((time.perf_counter() - begun) * 1000)
    connection.close()
    return times


def explode(port: int, bomb: str, org: str) -> None:
    """Set one off, and wait until it is over."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", f"/plugins/p/{org}/{bomb}")
        connection.getresponse().read()
    except (OSError, http.client.HTTPException):
        pass  # its worker died of it
    finally:
        connection.close()


def measure(port: int, bomb: str, rounds: int, seconds: float) -> dict[str, Any]:
    """Quiet and bombed, in turn."""
    quiet, bombed = [], []
    for number in range(rounds):
        quiet.append(latencies(port, seconds))
        thread = threading.Thread(target=explode, args=(port, bomb, f"{bomb}{number}"))
        thread.start()
        bombed.append(latencies(port, seconds))
        thread.join()
    ratios = [statistics.median(b) / statistics.median(q) for q, b in zip(quiet, bombed, strict=True)]
    tails = [percentile(b, 0.99) / percentile(q, 0.99) for q, b in zip(quiet, bombed, strict=True)]
    return {
        "quiet p50 ms": round(statistics.median(map(statistics.median, quiet)), 3),
        "bombed p50 ms": round(statistics.median(map(statistics.median, bombed)), 3),
        "ratio of p50": round(statistics.median(ratios), 2),
        "ratio of p99": round(statistics.median(tails), 2),
        "rounds": rounds,
    }


def plot(result: dict[str, Any], file: Path) -> None:
    """Bars of the ratios, and the line that they must not cross."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3))
    names = list(result)[::-1]
    axes.barh(names, [result[name]["ratio of p50"] for name in names], color="#4477aa")
    axes.axvline(2, color="#cc3311", linestyle="--", label="limit")
    axes.set_xlabel("latency of another org, times that in quiet (p50)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--isolation", default="auto")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        plugins = Path(directory)
        plugins.chmod(0o755)
        (plugins / "p").mkdir()
        (plugins / "p" / "pyproject.toml").write_text(MANIFEST + PERMISSIONS)
        (plugins / "p" / "plugin.py").write_text(PLUGIN)
        with running(plugins, "--no-reload", "--isolation", arguments.isolation) as host:
            host.get("/plugins/p/quiet/ping")
            level = json.loads(host.get("/plugins/p/quiet/health")[1])["isolation"]
            result = {bomb: measure(host.port, bomb, arguments.rounds, arguments.seconds) for bomb in BOMBS}
    for bomb, figures in result.items():
        print(f"{bomb:<12} p50 x {figures['ratio of p50']:<6} p99 x {figures['ratio of p99']}")
    if arguments.json:
        whole = {"machine": machine(), "isolation": level, "latency of another org": result}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
