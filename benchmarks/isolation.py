"""What each layer of isolation adds to the start of an org's worker, as the first request to it sees it.

python -m benchmarks.isolation --json benchmarks/results/isolation.json --plot docs/isolation.svg

One host per set of layers, all up at once, asked in turn: what disturbs the machine disturbs them alike. Each request
is the first to an org, so it waits for a fork, the confinement and ``on_start``.
"""

import argparse
import contextlib
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Final

from hayhost.bench.figures import machine, summary
from hayhost.bench.host import Host, running

from .reload import MANIFEST, save

SETS: Final = {
    "none": "none",
    "limits": "limits",
    "inspection": "inspection",
    "landlock": "landlock",
    "seccomp": "seccomp",
    "namespaces": "namespaces",
    "cgroups": "cgroups",
    "uid": "namespaces,uid",
    "confined": "limits,landlock,seccomp,inspection",
    "namespaced": "limits,landlock,seccomp,inspection,namespaces",
    "hardened": "limits,landlock,seccomp,inspection,namespaces,cgroups,uid",
}
"""What is measured, and the layers that are in force there."""


def measure(hosts: dict[str, Host], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of the first request to each of ``rounds`` orgs, by host, in turn."""
    times: dict[str, list[float]] = {name: [] for name in hosts}
    for number in range(rounds):
        for name, host in hosts.items():
            begun = time.perf_counter()
            status, _ = host.get(f"/plugins/p/org{number}/version")
            times[name].append((time.perf_counter() - begun) * 1000)
            if status != 200:
                raise RuntimeError(f"{name}: status {status}\n{host.log.read_text()}")
    return times


def report(times: dict[str, list[float]]) -> dict[str, Any]:
    """Per set of layers, milliseconds and what it adds to none: the median of the differences round by round."""
    base = times["none"]
    return {
        name: {
            **summary(values),
            "adds": round(statistics.median(a - b for a, b in zip(values, base, strict=True)), 2),
        }
        for name, values in times.items()
    }


def plot(result: dict[str, Any], file: Path) -> None:
    """Bars of what each set adds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in result if name != "none"]
    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    axes.barh(names[::-1], [result[name]["adds"] for name in names[::-1]], color="#4477aa")
    axes.set_xlabel(f"ms added to the first request to an org (without any: {result['none']['p50']} ms)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        plugins = Path(directory)
        plugins.chmod(0o755)
        (plugins / "p").mkdir()
        (plugins / "p" / "pyproject.toml").write_text(MANIFEST)
        save(plugins / "p", 1)
        options = ["--spares", "0", "--no-reload", "--require", "none", "--layers"]
        hosts = {name: stack.enter_context(running(plugins, *options, layers)) for name, layers in SETS.items()}
        times = measure(hosts, arguments.rounds)
    result = report(times)
    for name, figures in result.items():
        print(f"{name:<12} p50 {figures['p50']:6.2f} ms   adds {figures['adds']:6.2f} ms")
    if arguments.json:
        whole = {"machine": machine(), "unit": "ms", "first request to an org": result}
        arguments.json.write_text(json.dumps(whole, indent=1) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
